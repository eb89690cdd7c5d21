"""`duohuo export`: everything that the mesh keeps of a user, for the user."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ops.arguments import Center, User, state_of
from ops.output import Failure, Format, Output, command, say

PAGE_SIZE = 100


def add_to(app: typer.Typer) -> None:
    """Adds the command to the program."""
    app.command()(export)


@command
async def export(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Where to write it, as JSON; must not exist yet.")],
    user: User = None,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Write down everything that is kept of a user. Example: duohuo export alice.json

    Account and profile with earlier values, notifications, sessions, all entries, transfers' applications.
    """
    import json

    from duohuo.v1.account_service_pb2 import AccountExport, ExportAccountRequest
    from duohuo.v1.session_service_pb2 import ListSessionsRequest, ListSessionsResponse
    from duohuo.v1.transfer_service_pb2 import (
        ListApplicationsRequest,
        ListApplicationsResponse,
        ListEntriesRequest,
        ListEntriesResponse,
    )
    from ops.client import connected
    from ops.mesh_file import write_private
    from ops.plain import plain

    if file.exists():
        raise Failure(
            f"{file} is there already", advice="Choose another name; nothing was written."
        )
    async with connected(state_of(context), center) as client:
        login = client.sessions.of(user)
        account = login.account_id

        async def pages(path: str, request: Any, answer: Any, field: str) -> list[Any]:
            found: list[Any] = []
            request.page_size = PAGE_SIZE
            while True:
                page = await client.call(path, request, answer, login)
                found += plain(page).get(field, [])
                request.page_token = page.next_page_token
                if not page.next_page_token:
                    return found

        kept = await client.call(
            "AccountService/ExportAccount",
            ExportAccountRequest(account_id=account),
            AccountExport,
            login,
        )
        sessions = await client.call(
            "SessionService/ListSessions",
            ListSessionsRequest(account_id=account),
            ListSessionsResponse,
            login,
        )
        entries = await pages(
            "TransferService/ListEntries",
            ListEntriesRequest(account_id=account),
            ListEntriesResponse,
            "entries",
        )
        applications = await pages(
            "TransferService/ListApplications",
            ListApplicationsRequest(payer_account_id=account),
            ListApplicationsResponse,
            "applications",
        )
        everything = {
            **plain(kept),
            **plain(sessions),
            "entries": entries,
            "applications": applications,
        }
        write_private(file, json.dumps(everything, ensure_ascii=False, indent=2) + "\n")
        text = f"Written to {file}: {len(entries)} entries, {len(applications)} applications."
        if sessions.unreachable_centers:
            text += f" Sessions of {', '.join(sessions.unreachable_centers)} are not in it: away."
        say(output, text, {"file": str(file), "account_id": account})
