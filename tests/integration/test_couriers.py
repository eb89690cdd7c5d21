"""Webhooks and mails with real servers: what they answer, and whom they must not be made to call."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from typing import Any

import pytest
import trustme
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session

from runtime.destinations import Destinations, system_resolve
from transfer_svc.courier import Mail, Undelivered
from transfer_svc.mail_client import MailClient, MailServer
from transfer_svc.webhook_client import WebhookClient

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]
LOOPBACK = ("127.0.0.0/8",)
SHORT_S = 0.3
"""For a server that never answers, however long it is given."""


@dataclass
class Listener:
    """A server that answers every call alike, and remembers them."""

    port: int = 0
    calls: list[bytes] = field(default_factory=list)


@asynccontextmanager
async def listening(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[Listener]:
    made = Listener()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            made.calls.append(head + await reader.readexactly(length))
            await answer(writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the caller has gone
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()


def says(text: str) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(text.encode())
        await writer.drain()

    return answer


def status(code: int, *headers: str) -> Answer:
    return says("\r\n".join([f"HTTP/1.1 {code} X", *headers, "Content-Length: 0", "", ""]))


async def hangs(_writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def never_ends(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 X\r\n")
    while not writer.is_closing():
        writer.write(b"X-Filler: " + b"x" * 1000 + b"\r\n")
        await writer.drain()


async def endless_body(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 1000000000000\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"x" * 1000)
        await writer.drain()


@asynccontextmanager
async def client(destinations: Destinations, **options: Any) -> AsyncIterator[WebhookClient]:
    made = WebhookClient(destinations, **options)
    try:
        yield made
    finally:
        await made.close()


async def post(
    answer: Answer, destinations: Destinations | None = None, **options: Any
) -> tuple[str, list[bytes]]:
    """What came of one call, and what the server got."""
    allowed = destinations or Destinations(system_resolve, True, LOOPBACK)
    async with listening(answer) as listener, client(allowed, **options) as made:
        try:
            url = f"http://127.0.0.1:{listener.port}/hook?of=alice"
            await made.post(url, {"Duohuo-Signature": "t=1,v1=2"}, b"{}")
        except Undelivered as undelivered:
            return undelivered.reason + (" final" if undelivered.final else ""), listener.calls
        return "delivered", listener.calls


@pytest.mark.parametrize("code", [200, 202, 204, 299])
async def test_any_2xx_means_that_it_has_arrived(code: int) -> None:
    outcome, (call,) = await post(status(code))
    assert outcome == "delivered"
    assert call.startswith(b"POST /hook?of=alice HTTP/1.1\r\n")
    assert b"Duohuo-Signature: t=1,v1=2\r\n" in call
    assert call.endswith(b"\r\n\r\n{}")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (status(400), "HTTP_400"),
        (status(500), "HTTP_500"),
        (status(410), "HTTP_410 final"),
        (says(""), "NO_ANSWER_RemoteProtocolError"),
        (says("SSH-2.0-OpenSSH\r\n\r\n"), "NO_ANSWER_RemoteProtocolError"),
        (never_ends, "NO_ANSWER_RemoteProtocolError"),
    ],
    ids=["400", "500", "410", "nothing", "not HTTP", "endless headers"],
)
async def test_any_other_answer_means_that_it_has_not(answer: Answer, reason: str) -> None:
    outcome, calls = await post(answer)
    assert (outcome, len(calls)) == (reason, 1)


async def test_the_body_of_an_answer_is_not_read() -> None:
    assert (await post(endless_body))[0] == "delivered"


async def test_a_server_that_hangs_is_given_up() -> None:
    assert (await post(hangs, timeout_s=SHORT_S))[0] == "TIMEOUT"


async def test_a_redirect_is_not_followed() -> None:
    async with listening(status(200)) as inner:
        there = f"Location: http://127.0.0.1:{inner.port}/internal"
        for code in (301, 302, 303, 307, 308):
            assert (await post(status(code, there)))[0] == f"HTTP_{code}"
        assert inner.calls == []


async def test_nobody_calls_a_loopback_address_unless_it_is_allowed() -> None:
    outcome, calls = await post(status(200), Destinations(system_resolve, True))
    assert (outcome, calls) == ("REFUSED_DESTINATION", [])


async def test_http_is_not_spoken_unless_it_is_allowed() -> None:
    outcome, calls = await post(status(200), Destinations(system_resolve, False, LOOPBACK))
    assert (outcome, calls) == ("REFUSED_DESTINATION", [])


async def test_a_name_that_leads_elsewhere_after_the_save_is_refused_at_the_call() -> None:
    """DNS rebinding: public when the URL is saved, loopback when it is called."""
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])

    async def rebinds(_host: str) -> Sequence[str]:
        return next(answers)

    destinations = Destinations(rebinds, http_allowed=True)
    assert await destinations.addresses("rebind.example.com")
    async with listening(status(200)) as listener, client(destinations) as made:
        with pytest.raises(Undelivered, match="REFUSED_DESTINATION"):
            await made.post(f"http://rebind.example.com:{listener.port}/", {}, b"{}")
    assert listener.calls == []


async def test_what_was_checked_is_what_is_called() -> None:
    """The name is asked for once; a second answer could be another one."""
    asked: list[str] = []

    async def resolve(host: str) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    destinations = Destinations(resolve, True, ("127.0.0.1/32",))
    async with listening(status(200)) as listener, client(destinations) as made:
        await made.post(f"http://hooks.example.com:{listener.port}/", {}, b"{}")
    assert asked == ["hooks.example.com"]
    assert b"Host: hooks.example.com:" in listener.calls[0]


async def test_where_several_addresses_lead_the_first_that_answers_is_called() -> None:
    async def resolve(_host: str) -> Sequence[str]:
        return ["127.0.0.2", "127.0.0.1"]  # nobody listens at the first

    destinations = Destinations(resolve, True, LOOPBACK)
    async with listening(status(200)) as listener, client(destinations) as made:
        await made.post(f"http://hooks.example.com:{listener.port}/", {}, b"{}")
    assert len(listener.calls) == 1


@pytest.mark.parametrize(("name", "good"), [("hooks.example.com", True), ("other.example", False)])
async def test_the_certificate_must_be_of_the_name_in_the_url(name: str, *, good: bool) -> None:
    async def resolve(_host: str) -> Sequence[str]:
        return ["127.0.0.1"]

    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(server)
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    destinations = Destinations(resolve, networks_allowed=LOOPBACK)
    for context, believed in ((trusted, good), (None, False)):
        async with (
            listening(status(200), server) as listener,
            client(destinations, trusted=context) as made,
        ):
            url = f"https://hooks.example.com:{listener.port}/"
            if believed:
                await made.post(url, {}, b"{}")
            else:
                with pytest.raises(Undelivered, match="NO_ANSWER_ConnectError"):
                    await made.post(url, {}, b"{}")
            assert len(listener.calls) == believed


@dataclass
class Mailbox:
    """What an aiosmtpd server is asked; its answers to a recipient and to a message are set by a test."""

    rcpt: str = "250 OK"
    data: str = "250 OK"
    envelopes: list[Envelope] = field(default_factory=list)
    users: list[bytes] = field(default_factory=list)

    async def handle_RCPT(
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: object
    ) -> str:
        envelope.rcpt_tos.append(address)
        return self.rcpt

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        self.envelopes.append(envelope)
        return self.data

    def authenticate(
        self, _server: SMTP, _session: Session, _envelope: Envelope, _mechanism: str, data: Any
    ) -> AuthResult:
        self.users.append(data.login)
        return AuthResult(success=data.password == b"a-mail-password")


MAIL = Mail("decided-q-a-001-1", "alice@example.com", "Your transfer was made", "Done.\n", 0)


@asynccontextmanager
async def mail_server(mailbox: Mailbox, **options: Any) -> AsyncIterator[int]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(mailbox, loop=loop, **options), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def sender(port: int, **options: Any) -> MailClient:
    return MailClient(
        MailServer("127.0.0.1", port, **{"tls": "none", "sender": "bank@bank.example", **options})
    )


async def test_a_mail_arrives_with_the_id_to_deduplicate_by() -> None:
    mailbox = Mailbox()
    async with mail_server(mailbox) as port:
        await sender(port).send(MAIL)
    (envelope,) = mailbox.envelopes
    assert (envelope.mail_from, envelope.rcpt_tos) == ("bank@bank.example", ["alice@example.com"])
    assert isinstance(envelope.content, bytes)
    message = message_from_bytes(envelope.content, policy=policy.default)
    assert message["Message-ID"] == "<decided-q-a-001-1@bank.example>"
    assert message["Subject"] == "Your transfer was made"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message.get_content_type() == "text/plain"
    assert message.get_content() == "Done.\r\n"


@pytest.mark.parametrize(
    ("mailbox", "reason", "final"),
    [
        (Mailbox(rcpt="550 5.1.1 no such user"), "SMTP_550", True),
        (Mailbox(rcpt="450 4.2.1 later"), "SMTP_450", False),
        (Mailbox(data="451 4.3.0 later"), "SMTP_451", False),
        (Mailbox(data="554 5.7.1 spam"), "SMTP_554", False),
    ],
    ids=["unknown recipient", "recipient later", "message later", "message refused"],
)
async def test_a_refusal_says_whether_it_is_of_any_use_to_try_again(
    mailbox: Mailbox, reason: str, *, final: bool
) -> None:
    async with mail_server(mailbox) as port:
        with pytest.raises(Undelivered) as refused:
            await sender(port).send(MAIL)
    assert (refused.value.reason, refused.value.final) == (reason, final)


async def test_no_mail_travels_in_the_clear_where_encryption_is_wanted() -> None:
    """Also with a password: it must not be sent to a server that offers none."""
    mailbox = Mailbox()
    async with mail_server(
        mailbox, authenticator=mailbox.authenticate, auth_require_tls=False
    ) as port:
        with pytest.raises(Undelivered, match="NO_MAIL_SERVER"):
            await sender(port, tls="starttls", user="bank", password="a-mail-password").send(MAIL)
    assert (mailbox.envelopes, mailbox.users) == ([], [])


@pytest.mark.parametrize(("name", "good"), [("127.0.0.1", True), ("mail.example.com", False)])
async def test_the_password_is_for_the_server_whose_certificate_is_good(
    name: str, *, good: bool
) -> None:
    authority = trustme.CA()
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(own)
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    mailbox = Mailbox()
    async with mail_server(mailbox, tls_context=own, authenticator=mailbox.authenticate) as port:
        server = MailServer(
            "127.0.0.1", port, "starttls", "bank@bank.example", "bank", "a-mail-password"
        )
        assert "a-mail-password" not in repr(server)
        mails = MailClient(server, trusted=trusted)
        if good:
            await mails.send(MAIL)
        else:
            with pytest.raises(Undelivered, match="NO_MAIL_SERVER"):
                await mails.send(MAIL)
    assert len(mailbox.envelopes) == good
    assert mailbox.users == ([b"bank"] if good else [])


async def test_without_a_server_mails_are_dead_letters() -> None:
    with pytest.raises(Undelivered) as refused:
        await MailClient(None).send(MAIL)
    assert (refused.value.reason, refused.value.final) == ("NO_MAIL_SERVER", True)


async def test_a_mail_server_that_is_away_is_tried_again() -> None:
    async with mail_server(Mailbox()) as port:
        pass
    with pytest.raises(Undelivered) as refused:
        await sender(port).send(MAIL)
    assert not refused.value.final
