"""Hands mails to the mail server of the settings, over SMTP."""

import ssl
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.utils import formatdate
from typing import Literal

import aiosmtplib

from transfer_svc.courier import Mail, Undelivered

TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class MailServer:
    """Where mails are handed in, and by whom."""

    host: str
    port: int
    tls: Literal["starttls", "implicit", "none"]
    sender: str
    user: str = ""
    password: str = field(default="", repr=False)


class MailClient:
    """Hands over one mail per connection; without a server, none."""

    def __init__(
        self,
        server: MailServer | None,
        timeout_s: float = TIMEOUT_S,
        trusted: ssl.SSLContext | None = None,
    ) -> None:
        """`trusted` says which certificates are good; those that the machine trusts, if left out."""
        self._server = server
        self._timeout_s = timeout_s
        self._trusted = trusted

    async def send(self, mail: Mail) -> None:
        """Raises Undelivered."""
        server = self._server
        if server is None:
            raise Undelivered("NO_MAIL_SERVER", final=True)
        try:
            await aiosmtplib.send(
                _message(mail, server.sender),
                hostname=server.host,
                port=server.port,
                use_tls=server.tls == "implicit",
                start_tls=server.tls == "starttls",
                username=server.user or None,
                password=server.password or None,
                tls_context=self._trusted,
                timeout=self._timeout_s,
            )
        except aiosmtplib.SMTPRecipientsRefused as refused:
            codes = [recipient.code for recipient in refused.recipients]
            raise Undelivered(f"SMTP_{codes[0]}", final=min(codes) >= 500) from None
        except aiosmtplib.SMTPResponseException as refused:
            # Only of the recipient is a refusal final: anything else an operator can put right.
            raise Undelivered(f"SMTP_{refused.code}") from None
        except aiosmtplib.SMTPTimeoutError:
            raise Undelivered("TIMEOUT") from None
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            raise Undelivered(f"NO_MAIL_SERVER_{type(error).__name__}") from None


def _message(mail: Mail, sender: str) -> EmailMessage:
    message = EmailMessage()
    message["From"] = sender
    message["To"] = mail.recipient
    message["Subject"] = mail.subject
    message["Date"] = formatdate(mail.time_ms / 1000)
    message["Message-ID"] = f"<{mail.message_id}@{sender.rpartition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody answers with an absence note
    message.set_content(mail.text)
    return message
