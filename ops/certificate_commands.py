"""Commands for the certificates by which a mesh's processes know each other (docs/certificates.md)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.arguments import state_of
from ops.output import Failure, Format, Output, command, say, table

if TYPE_CHECKING:
    from datetime import datetime

    from ops.authority import Authority, Issued

Directory = Annotated[
    Path | None,
    typer.Option(help="Where the authority is; that of the local mesh if left out."),
]
_NEXT = {
    "trust": "A new authority is trusted as well. Once every process has read that, run this again: "
    "it issues all certificates anew.",
    "issue": "All certificates are issued by the new authority. Once every process has read its own, "
    "run this again: the old authority is not trusted any more.",
    "retire": "Only the new authority is trusted. The exchange is complete.",
}


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    certs = typer.Typer(
        no_args_is_help=True, help="Certificates by which a mesh's processes know each other."
    )
    certs.command()(init)
    certs.command()(show)
    certs.command()(renew)
    certs.command("rotate-ca")(rotate_ca)
    certs.command()(revoke)
    app.add_typer(certs, name="certs")


@command
async def init(
    context: typer.Context,
    centers: Annotated[str, typer.Option(help="Names of the centers, with commas.")] = "a,b",
    directory: Directory = None,
    output: Output = Format.TEXT,
) -> None:
    """Make an authority, and a certificate for each center and role, and for its NATS server.

    Example: duohuo certs init --centers a,b --directory certs

    What is there already stays, unless it is due for renewal. `duohuo up` does this by itself.
    """
    from ops.ports import ROLES, plan

    authority = _authority(context, directory)
    try:
        names = list(plan(centers.split(","), 7000).centers)
    except ValueError as error:
        raise Failure(str(error)) from None
    with _told():
        made = authority.init()
        for center in names:
            authority.ensure_center(center, {role: [role] for role in ROLES})
    say(
        output,
        f"{'Made an' if made else 'There is an'} authority in {authority.directory}, with a certificate "
        "for each center and role, and its NATS server. Keep ca.key where nobody but you gets at it.",
        {"directory": str(authority.directory), "made": made, "centers": names},
    )


@command
async def show(
    context: typer.Context, directory: Directory = None, output: Output = Format.TEXT
) -> None:
    """Show what certificates there are, and how long they last. Example: duohuo certs show"""
    authority = _authority(context, directory)
    with _told():
        trusted, issued, revoked = authority.trusted(), authority.issued(), authority.revoked()
    rows = [
        ("authority", "", f"{one.serial_number:x}", _until(one.not_valid_after_utc))
        for one in trusted
    ]
    rows += [
        (
            f"{one.center}/{one.process}",
            "revoked" if one.serial in revoked else "due" if one.is_due(authority.now) else "",
            f"{one.serial:x}",
            _until(one.certificate.not_valid_after_utc),
        )
        for one in issued
    ]
    say(
        output,
        table(("CERTIFICATE", "STATE", "SERIAL", "EXPIRES"), rows),
        {
            "authorities": [
                {"serial": f"{one.serial_number:x}", "expires": one.not_valid_after_utc.isoformat()}
                for one in trusted
            ],
            "certificates": [
                {**_shown(one), "due": one.is_due(authority.now), "revoked": one.serial in revoked}
                for one in issued
            ],
        },
    )


@command
async def renew(
    context: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Also what is not due.")] = False,
    directory: Directory = None,
    output: Output = Format.TEXT,
) -> None:
    """Issue anew what has less than a third of its time left. Example: duohuo certs renew

    Running processes take the new ones within a second, without a restart.
    """
    authority = _authority(context, directory)
    with _told():
        renewed = authority.renew(everything=everything)
    text = (
        table(
            ("RENEWED", "EXPIRES"),
            [
                (f"{one.center}/{one.process}", _until(one.certificate.not_valid_after_utc))
                for one in renewed
            ],
        )
        if renewed
        else "Nothing is due."
    )
    say(output, text, {"renewed": [_shown(one) for one in renewed]})


@command
async def rotate_ca(
    context: typer.Context, directory: Directory = None, output: Output = Format.TEXT
) -> None:
    """Exchange the authority, one of three steps each time. Example: duohuo certs rotate-ca

    Between two steps every process must have read what the first has changed: those of a local mesh do
    within a second or two, and log `certificates have changed`.
    """
    authority = _authority(context, directory)
    with _told():
        step = authority.rotate()
    say(output, _NEXT[step], {"step": step})


@command
async def revoke(
    context: typer.Context,
    serial: Annotated[
        str | None, typer.Argument(help="Its serial number, as `certs show` shows it.")
    ] = None,
    center: Annotated[
        str | None, typer.Option(help="Instead: all of a center, one that is gone for good.")
    ] = None,
    directory: Directory = None,
    output: Output = Format.TEXT,
) -> None:
    """Have certificates not trusted any more. Example: duohuo certs revoke 5f2a...

    Calls with it are refused within a second. Its process goes on only with a new one: `certs renew --all`.
    """
    authority = _authority(context, directory)
    if (serial is None) is (center is None):
        raise Failure("what is to be revoked?", advice="Give a serial number, or --center.")
    with _told():
        if center is not None:
            found = authority.revoke_center(center)
        else:
            try:
                number = int(serial or "", 16)
            except ValueError:
                raise Failure(f"{serial} is no serial number") from None
            found = [authority.revoke(number)]
    text = "\n".join(f"The certificate of {one.center}/{one.process} is revoked." for one in found)
    say(output, text, {"revoked": [_shown(one) for one in found]})


def _authority(context: typer.Context, directory: Path | None) -> "Authority":
    from ops import mesh_file
    from ops.authority import Authority, now

    return Authority(directory or state_of(context) / mesh_file.CERTIFICATES_NAME, now())


@contextmanager
def _told() -> Iterator[None]:
    """Says what is wrong with the files."""
    from ops.authority import AuthorityError

    try:
        yield
    except (AuthorityError, OSError) as error:
        raise Failure(str(error), advice="`duohuo certs init` makes an authority.") from None


def _until(end: "datetime") -> str:
    return f"{end:%Y-%m-%d}"


def _shown(one: "Issued") -> dict[str, str]:
    return {
        "center": one.center,
        "process": one.process,
        "serial": f"{one.serial:x}",
        "expires": one.certificate.not_valid_after_utc.isoformat(),
    }
