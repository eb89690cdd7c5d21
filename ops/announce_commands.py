"""Commands for what users are told: `duohuo announce`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ops.arguments import Center, state_of
from ops.output import Failure, Format, Output, command, say, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from duohuo.v1.announcement_service_pb2 import Announcement

ENGLISH = "en"
About = Annotated[
    str, typer.Option("--user", help="Only what affects this user: identifier or account id.")
]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    announce = typer.Typer(
        no_args_is_help=True, help="Tell users what does not work, and see what they are told."
    )
    announce.command("raise")(raise_announcement)
    announce.command()(lift)
    announce.command("list")(list_announcements)
    announce.command()(watch)
    app.add_typer(announce, name="announce")


@command
async def raise_announcement(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="What users are told, in English.")],
    about: Annotated[
        str, typer.Option("--about", help="The center whose users are affected; all if left out.")
    ] = "",
    translations: Annotated[
        list[str] | None,
        typer.Option("--in", help="The same in another language: zh=... May be repeated."),
    ] = None,
    minutes: Annotated[
        int | None, typer.Option(min=1, help="It ends by itself after so long.")
    ] = None,
    announcement: Annotated[
        str | None,
        typer.Option("--id", help="Its id; made up if left out. Repeat it to ask again."),
    ] = None,
    output: Output = Format.TEXT,
) -> None:
    """Tell users something, at all centers. Errors that an outage causes say it, too.
    Example: duohuo announce raise "Transfers pause from 02:00 to 02:10." --about b --minutes 60"""
    from duohuo.v1.announcement_service_pb2 import Announcement
    from duohuo.v1.operator_service_pb2 import RaiseAnnouncementRequest
    from ops.client import ask_some_operator
    from ops.plain import plain
    from runtime.clock import SystemClock, timestamp
    from runtime.ids import RandomIds

    request = RaiseAnnouncementRequest(
        announcement_id=announcement or RandomIds().unique(),
        center=about,
        texts={ENGLISH: text},
    )
    for translation in translations or ():
        language, found, said = translation.partition("=")
        if not found or not language or not said:
            raise Failure(
                f"{translation} names no language, or says nothing", advice='Try: --in zh="..."'
            )
        request.texts[language] = said
    if minutes is not None:
        request.end_time.CopyFrom(timestamp(SystemClock().wall_ms() + minutes * 60_000))
    done = await ask_some_operator(state_of(context), "RaiseAnnouncement", request, Announcement)
    advice = f"Lift it with: duohuo announce lift {done.announcement_id}"
    say(output, f"{_shown([done])}\n{advice}", plain(done))


@command
async def lift(
    context: typer.Context,
    announcement: Annotated[str, typer.Argument(help="Its id in the list.")],
    output: Output = Format.TEXT,
) -> None:
    """End what an operator has told users. Example: duohuo announce lift 0192f0c1d2e3f4a5"""
    from duohuo.v1.announcement_service_pb2 import Announcement
    from duohuo.v1.operator_service_pb2 import LiftAnnouncementRequest
    from ops.client import ask_some_operator
    from ops.plain import plain

    request = LiftAnnouncementRequest(announcement_id=announcement)
    done = await ask_some_operator(state_of(context), "LiftAnnouncement", request, Announcement)
    say(output, f"Lifted: {done.text}", plain(done))


@command
async def list_announcements(
    context: typer.Context,
    user: About = "",
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Show what users are told. Example: duohuo announce list --user alice@example.com"""
    from duohuo.v1.announcement_service_pb2 import (
        ListAnnouncementsRequest,
        ListAnnouncementsResponse,
    )
    from ops.client import connected
    from ops.plain import plain

    async with connected(state_of(context), center) as client:
        found = await client.call(
            "AnnouncementService/ListAnnouncements",
            ListAnnouncementsRequest(user=user),
            ListAnnouncementsResponse,
        )
    say(output, _shown(found.announcements), plain(found))


@command
async def watch(
    context: typer.Context,
    user: About = "",
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Show what users are told, again whenever it changes, until Ctrl-C. Example: duohuo announce watch"""
    from duohuo.v1.announcement_service_pb2 import (
        ListAnnouncementsResponse,
        WatchAnnouncementsRequest,
    )
    from ops.client import connected
    from ops.plain import plain

    async with connected(state_of(context), center) as client:
        async for found in client.stream(
            "AnnouncementService/WatchAnnouncements",
            WatchAnnouncementsRequest(user=user),
            ListAnnouncementsResponse,
        ):
            say(output, _shown(found.announcements), plain(found))


def _shown(announcements: "Sequence[Announcement]") -> str:
    from runtime.clock import iso

    rows: list[Sequence[Any]] = [
        (
            one.announcement_id,
            one.center or "all",
            iso(one.start_time.ToMilliseconds()),
            iso(one.end_time.ToMilliseconds()) if one.HasField("end_time") else "-",
            " ".join(sorted(one.texts)),
            one.text,
        )
        for one in announcements
    ]
    if not rows:
        return "Nothing is announced."
    return table(("ANNOUNCEMENT", "USERS OF", "SINCE", "UNTIL", "IN", "TEXT"), rows)
