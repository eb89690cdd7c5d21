"""Results reach users: a real mesh, a real web server of a user, and a real mail server."""

import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller

from duohuo.webhooks import HEADER, verified
from tests.integration.conftest import (
    PROGRAM,
    Cli,
    RunningMesh,
    free_port_base,
    start_mesh,
    wait_until,
)
from tests.integration.test_main_path import new_user

SECRET = "canary-webhook-secret"
PATH_CANARY = "canary-webhook-path"


@dataclass
class Receiver:
    """A user's web server. What it answers first is set by a test; then it takes everything."""

    port: int = 0
    answers: list[int] = field(default_factory=list)
    hangs: threading.Event | None = None
    """Until it is set, nothing is answered."""
    events: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def of(self, application: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["application_id"] == application]

    def url(self, name: str = "hook") -> str:
        return f"http://127.0.0.1:{self.port}/{PATH_CANARY}/{name}"


class _Handler(BaseHTTPRequestHandler):
    receiver: Receiver

    def do_POST(self) -> None:
        receiver = self.receiver
        body = self.rfile.read(int(self.headers["Content-Length"]))
        # As docs/notifications.md tells receivers to do it.
        receiver.events.append(verified(body, self.headers.get(HEADER), SECRET))
        receiver.paths.append(self.path)
        if receiver.hangs is not None:
            receiver.hangs.wait()
        code = receiver.answers.pop(0) if receiver.answers else 204
        self.send_response(code)
        if 300 <= code < 400:
            self.send_header("Location", f"http://127.0.0.1:{receiver.port}/internal")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Tests say enough."""


class Mails:
    """A mail server's message handler."""

    def __init__(self) -> None:
        self.envelopes: list[Any] = []

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
        self.envelopes.append(envelope)
        return "250 OK"

    def to(self, recipient: str) -> list[Any]:
        return [
            message_from_bytes(one.content, policy=policy.default)
            for one in self.envelopes
            if one.rcpt_tos == [recipient]
        ]


@pytest.fixture(scope="module")
def mails() -> Mails:
    return Mails()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, mails: Mails) -> Iterator[RunningMesh]:
    """A mesh that may call this machine, and hands its mail to a server of the test."""
    base = free_port_base()
    port = base + 399  # of this block of ports, the last, which no center uses
    controller = Controller(mails, "127.0.0.1", port)
    controller.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUOHUO_WEBHOOK_HTTP_ALLOWED", "true")
        patch.setenv("DUOHUO_WEBHOOK_NETWORKS_ALLOWED", '["127.0.0.0/8"]')
        patch.setenv("DUOHUO_SMTP_HOST", "127.0.0.1")
        patch.setenv("DUOHUO_SMTP_PORT", str(port))
        patch.setenv("DUOHUO_SMTP_TLS", "none")
        patch.setenv("DUOHUO_SMTP_FROM", "bank@bank.example")
        running = start_mesh(tmp_path_factory.mktemp("mesh"), port_base=base)
        yield running
    assert running.stop() == 0
    controller.stop()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    handler = type("Handler", (_Handler,), {"receiver": made})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        made.port = server.server_address[1]
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield made
        if made.hangs is not None:
            made.hangs.set()
        server.shutdown()
        serving.join()


@pytest.fixture
def secret_file(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    return str(path)


def listening_user(cli: Cli, home: str, url: str, secret_file: str, *options: str) -> str:
    """A user with money who wants to be called."""
    user = new_user(cli, home, 1000)
    cli.json("notify", user, "--webhook", url, "--secret-file", secret_file, *options)
    return user


def apply(cli: Cli, payer: str, origin: str, amount: int = 5) -> str:
    payee = new_user(cli, "b")
    applied = cli.json("apply", payee, str(amount), "--from", payer, "--center", origin)
    return str(applied["application_id"])


def state_of(cli: Cli, user: str, application: str, center: str) -> str:
    listed = cli.json("applications", user, "--center", center)["applications"]
    return next(str(one["state"]) for one in listed if one["application_id"] == application)


def undelivered(cli: Cli, center: str, application: str) -> list[Any]:
    listed = cli.json("notifications", "list", center)["deliveries"]
    return [one for one in listed if one["subject_id"] == application]


@pytest.mark.parametrize("origin", ["a", "b"])
def test_the_end_of_an_application_reaches_its_user_by_webhook_and_mail(
    mesh: RunningMesh, mails: Mails, receiver: Receiver, secret_file: str, origin: str
) -> None:
    user = listening_user(mesh.cli, "a", receiver.url(), secret_file, "--email")
    application = apply(mesh.cli, user, origin, 5000)
    wait_until(lambda: receiver.of(application) and mails.to(user))
    (event,) = receiver.of(application)
    assert event["id"] == f"decided-{application}"
    assert (event["type"], event["state"]) == ("application.decided", "FAILED")
    assert event["reason"] == "INSUFFICIENT_FUNDS"
    assert event["amount"] == {"currency_code": "CNY", "minor_units": 5000}
    (mail,) = mails.to(user)
    assert mail["Message-ID"] == f"<decided-{application}@bank.example>"
    assert "INSUFFICIENT_FUNDS" in mail.get_content()


def test_any_center_streams_the_end_of_an_application(mesh: RunningMesh) -> None:
    user = new_user(mesh.cli, "a", 1000)
    mesh.cli.json("login", user, "--center", "b")
    watching = subprocess.Popen(
        [
            *(PROGRAM, "--state", str(mesh.cli.state), "applications", user, "--watch"),
            *("--center", "b", "-o", "json"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        application = apply(mesh.cli, user, "a")
        assert watching.stdout is not None
        seen = ""
        for line in watching.stdout:
            seen += line
            if application in seen and "SUCCEEDED" in seen:
                break
        else:
            pytest.fail(seen)
    finally:
        watching.kill()
        watching.communicate()


def test_errors_are_tried_again_until_it_has_arrived(
    mesh: RunningMesh, receiver: Receiver, secret_file: str
) -> None:
    receiver.answers = [500, 503]
    user = listening_user(mesh.cli, "a", receiver.url(), secret_file)
    application = apply(mesh.cli, user, "a")
    wait_until(lambda: len(receiver.of(application)) == 3, within_s=40)
    assert len({str(event) for event in receiver.of(application)}) == 1
    wait_until(lambda: undelivered(mesh.cli, "a", application) == [])


def test_a_redirect_is_not_followed_and_an_operator_can_drop_it(
    mesh: RunningMesh, receiver: Receiver, secret_file: str
) -> None:
    receiver.answers = [302] * 1000
    user = listening_user(mesh.cli, "a", receiver.url(), secret_file)
    application = apply(mesh.cli, user, "a")
    wait_until(lambda: undelivered(mesh.cli, "a", application))
    (waiting,) = undelivered(mesh.cli, "a", application)
    assert (waiting["channel"], waiting["state"]) == ("WEBHOOK", "WAITING")
    assert waiting["last_error"] == "HTTP_302"
    assert "next_attempt_time" in waiting
    noted = waiting["notification_id"]
    (dropped,) = mesh.cli.json("notifications", "drop", "a", noted)["deliveries"]
    assert dropped["state"] == "DROPPED"
    assert undelivered(mesh.cli, "a", application) == []
    refused = mesh.cli.refused("notifications", "drop", "a", noted)
    assert refused["reason"] == "NOT_UNDELIVERED"
    assert set(receiver.paths) == {f"/{PATH_CANARY}/hook"}


def test_a_dead_letter_is_listed_told_and_retried(
    mesh: RunningMesh, receiver: Receiver, secret_file: str
) -> None:
    receiver.answers = [410]  # gone: not tried again by itself
    user = listening_user(mesh.cli, "b", receiver.url(), secret_file)
    application = apply(mesh.cli, user, "b")
    wait_until(lambda: undelivered(mesh.cli, "b", application))
    (letter,) = undelivered(mesh.cli, "b", application)
    assert (letter["state"], letter["last_error"]) == ("DEAD", "HTTP_410")
    assert "center b gave up 1 notifications" in mesh.cli.run("status").stdout
    assert letter["notification_id"] in mesh.cli.run("notifications", "list", "b").stdout
    (retried,) = mesh.cli.json("notifications", "retry", "b")["deliveries"]
    assert retried["state"] == "WAITING"
    (action,) = mesh.cli.json("audit", "list", "--target", letter["notification_id"])["actions"]
    assert (action["action"], action["center"]) == ("notification retry", "b")
    wait_until(lambda: len(receiver.of(application)) == 2)
    wait_until(lambda: undelivered(mesh.cli, "b", application) == [])


def test_a_killed_center_sends_what_it_had_not_when_it_is_back(
    mesh: RunningMesh, mails: Mails, receiver: Receiver, secret_file: str
) -> None:
    """Killed while a call hangs: decided, and nobody has said that it arrived."""
    hanging = receiver.hangs = threading.Event()
    user = listening_user(mesh.cli, "a", receiver.url(), secret_file, "--email")
    application = apply(mesh.cli, user, "b")
    wait_until(lambda: receiver.of(application))
    assert state_of(mesh.cli, user, application, "b") == "SUCCEEDED"
    mesh.cli.json("center", "kill", "b")
    receiver.events.clear()
    receiver.hangs = None
    hanging.set()
    mesh.cli.json("center", "start", "b")
    wait_until(lambda: receiver.of(application), within_s=40)
    wait_until(lambda: mails.to(user))
    # More than once, perhaps: each with the one id.
    assert {event["id"] for event in receiver.of(application)} == {f"decided-{application}"}


def test_the_origin_tells_a_user_whose_home_is_away(
    mesh: RunningMesh, receiver: Receiver, secret_file: str
) -> None:
    """The setting has been copied; so the end that came before home's loss is told without it."""
    receiver.answers = [500]
    user = listening_user(mesh.cli, "a", receiver.url(), secret_file)
    application = apply(mesh.cli, user, "b")
    wait_until(lambda: receiver.of(application))
    mesh.cli.json("center", "kill", "a")
    try:
        wait_until(lambda: len(receiver.of(application)) == 2, within_s=40)
    finally:
        mesh.cli.json("center", "start", "a")


def test_addresses_are_checked_when_a_webhook_is_set(mesh: RunningMesh, secret_file: str) -> None:
    user = new_user(mesh.cli, "a")
    for url in (
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/",
        "https://[::1]/",
        "https://2130706433/",
        "https://alice:secret@example.com/",
    ):
        refused = mesh.cli.refused("notify", user, "--webhook", url, "--secret-file", secret_file)
        assert refused["reason"] == "INVALID_FIELD", url
    shown = mesh.cli.json("notify", user)
    assert (shown["webhook_url"], shown["email"]) == ("", False)


def test_a_secret_that_is_made_up_is_shown_once(mesh: RunningMesh, receiver: Receiver) -> None:
    user = new_user(mesh.cli, "a")
    made = mesh.cli.json("notify", user, "--webhook", receiver.url())
    assert len(made["webhook_secret"]) == 43
    again = mesh.cli.json("notify", user, "--webhook", receiver.url("other"), "--no-email")
    assert (again["webhook_url"], again["webhook_secret_set"]) == (receiver.url("other"), True)
    assert "webhook_secret" not in again
    assert made["webhook_secret"] not in mesh.cli.run("notify", user).stdout


def test_no_secret_and_no_url_is_in_a_log_or_a_span(
    mesh: RunningMesh, receiver: Receiver, secret_file: str
) -> None:
    receiver.answers = [500, 410]
    user = listening_user(mesh.cli, "a", receiver.url(), secret_file, "--email")
    application = apply(mesh.cli, user, "a")

    def dead() -> list[Any]:
        return [one for one in undelivered(mesh.cli, "a", application) if one["state"] == "DEAD"]

    wait_until(dead, within_s=40)
    mesh.cli.json("notifications", "drop", "a", f"decided-{application}")
    logs = "".join(path.read_text() for path in mesh.cli.state.rglob("*.log"))
    assert "operator action: notification drop" in logs

    def spans() -> str:
        found = ""
        for path in mesh.cli.state.rglob("spans.db"):
            with closing(sqlite3.connect(path, timeout=10)) as database:
                found += "".join(database.iterdump())
        return found

    wait_until(lambda: "HTTP_410" in spans())
    assert "notify by webhook" in spans()
    for canary in (SECRET, PATH_CANARY, "bank@bank.example", user):
        assert canary not in logs + spans()
