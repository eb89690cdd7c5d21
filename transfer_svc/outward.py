"""The courier of a real center: HTTP and SMTP."""

from collections.abc import Mapping
from dataclasses import dataclass

from transfer_svc.courier import Mail
from transfer_svc.mail_client import MailClient
from transfer_svc.webhook_client import WebhookClient


@dataclass(frozen=True, slots=True)
class Outward:
    """Carries notifications to users' servers, and to the mail server."""

    webhooks: WebhookClient
    mails: MailClient

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> None:
        await self.webhooks.post(url, headers, body)

    async def mail(self, mail: Mail) -> None:
        await self.mails.send(mail)
