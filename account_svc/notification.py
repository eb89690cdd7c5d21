"""How an account hears what became of its applications: the setting, and what it must look like.

It belongs to the account, as its profile does, and travels like it: any center takes a change while home
is away, every center has a copy, the last writer wins. What has lost is not kept, for it holds a secret.
"""

import re
from typing import NamedTuple

from grpc import StatusCode

from account_svc import erasure
from duohuo.v1.account_service_pb2 import Notification, SetNotificationRequest
from runtime.destinations import Destinations, RefusedDestination
from runtime.errors import RpcError, invalid
from runtime.store import Row, Unit, query
from sync_bus.copies import CopiedTable
from sync_bus.merge import Version, wins

SCHEMA = """
CREATE TABLE IF NOT EXISTS notification_setting (
  account_id TEXT NOT NULL PRIMARY KEY, webhook_url TEXT NOT NULL, webhook_secret TEXT NOT NULL,
  email INTEGER NOT NULL, hlc INTEGER NOT NULL, center TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""
_SECRET = re.compile(r"[!-~]{16,128}")


class Setting(NamedTuple):
    """What an account wants. Nothing, until it says something."""

    webhook_url: str = ""
    webhook_secret: str = ""
    email: bool = False

    def shown(self, account_id: str) -> Notification:
        """As its owner sees it."""
        return Notification(
            account_id=account_id,
            webhook_url=self.webhook_url,
            webhook_secret_set=bool(self.webhook_secret),
            email=self.email,
        )


async def checked(
    request: SetNotificationRequest,
    identifier: str,
    present: Setting,
    destinations: Destinations,
    *,
    email_offered: bool,
) -> Setting:
    """The setting that a request asks for. Raises RpcError."""
    if request.email and not is_email(identifier):
        raise invalid("email", "your account has no e-mail address")
    if request.email and not email_offered:
        raise RpcError(
            StatusCode.FAILED_PRECONDITION,
            "EMAIL_NOT_OFFERED",
            "this mesh sends no mail",
            advice="Use a webhook, or WatchApplications.",
        )
    if not request.webhook_url:
        if request.webhook_secret:
            raise invalid("webhook_secret", "is for a webhook_url, which is empty")
        return Setting(email=request.email)
    secret = request.webhook_secret or present.webhook_secret
    if not _SECRET.fullmatch(secret):
        raise invalid(
            "webhook_secret", "must have 16 to 128 printable ASCII characters, without spaces"
        )
    try:
        origin = destinations.origin(request.webhook_url)
        await destinations.addresses(origin.host)
    except RefusedDestination as refused:
        raise invalid("webhook_url", str(refused)) from None
    return Setting(request.webhook_url, secret, request.email)


def is_email(identifier: str) -> bool:
    return "@" in identifier


def find(account_id: str) -> Unit[Setting | None]:
    rows = yield from query(
        "SELECT webhook_url, webhook_secret, email FROM notification_setting WHERE account_id = ?",
        account_id,
    )
    return Setting(rows[0][0], rows[0][1], bool(rows[0][2])) if rows else None


def merge(account_id: str, setting: Setting, version: Version) -> Unit[None]:
    """Stores a setting, unless a later one is here."""
    rows = yield from query(
        "SELECT hlc, center FROM notification_setting WHERE account_id = ?", account_id
    )
    if not wins(version, Version(*rows[0]) if rows else None):
        return
    yield from query(
        "INSERT INTO notification_setting VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (account_id)"
        " DO UPDATE SET webhook_url = excluded.webhook_url, webhook_secret = excluded.webhook_secret,"
        " email = excluded.email, hlc = excluded.hlc, center = excluded.center",
        account_id,
        setting.webhook_url,
        setting.webhook_secret,
        int(setting.email),
        *version,
    )


def _put(row: Row) -> Unit[None]:
    account_id, url, secret, email, hlc, center = row
    yield from merge(account_id, Setting(url, secret, bool(email)), Version(hlc, center))


TABLE = CopiedTable(
    "notification_setting",
    ("account_id", "webhook_url", "webhook_secret", "email", "hlc", "center"),
    keys=1,
    owner="center",
    merged=True,
    version=lambda row: row[4:],
    put=_put,
    gone=erasure.is_gone,
)
