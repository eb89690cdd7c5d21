"""A statement is paged stably, is whole or fails, and cannot be made to run in a spreadsheet."""

import csv
import io
import json
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from typer.testing import CliRunner

import ops.client
from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import Entry, ListEntriesRequest, ListEntriesResponse
from ops.client import Login
from ops.main import app
from ops.output import Failure
from ops.statement import (
    Period,
    defused,
    entries,
    period,
    whole_file,
    write_csv,
    write_json,
    write_table,
)
from runtime.clock import timestamp
from runtime.dispatcher import Incoming
from runtime.errors import unreachable
from tests.fakes import NOON_MS, account
from tests.unit.bank import Bank, bank
from transfer_svc.payees import Payees
from transfer_svc.service import TransferService

ALICE, ALAN = account(0), account(2)
"""At home at a."""
LOGIN = Login(ALICE, "token")
DAY_MS = 24 * 3600 * 1000


@pytest.fixture
async def one() -> AsyncIterator[Bank]:
    async with bank("a", "b") as opened:
        yield opened


def service(one: Bank) -> TransferService:
    a = one.centers["a"]
    return TransferService(
        a.site, a.store, Payees(a.site, a.store), lambda _source: 0, lambda _: None, a.slots
    )


async def test_pages_stay_what_they_are_while_new_entries_arrive(one: Bank) -> None:
    """Between any two pages money comes and goes; nothing is told twice or left out."""
    for number in range(1, 8):
        await one.deposit(ALICE, number, f"deposit-{number}")
    rpc, token = service(one), ""
    told: list[Entry] = []
    for page in range(10):
        request = ListEntriesRequest(account_id=ALICE, page_size=2, page_token=token)
        found = await rpc.ListEntries(request, Incoming(ALICE, 1.0))
        told += found.entries
        await one.deposit(ALICE, 100, f"later-{page}")
        await one.pay(ALICE, ALAN, 1, f"transfer-{page}")
        token = found.next_page_token
        if not token:
            break
    assert [entry.number for entry in told] == [7, 6, 5, 4, 3, 2, 1]
    assert [entry.transfer_id for entry in told] == [f"deposit-{n}" for n in range(7, 0, -1)]
    assert [entry.balance_after.minor_units for entry in told] == [28, 21, 15, 10, 6, 3, 1]
    newest = await rpc.ListEntries(ListEntriesRequest(account_id=ALICE), Incoming(ALICE, 1.0))
    assert [entry.number for entry in newest.entries] == list(range(15, 0, -1))


def entry(number: int, memo: str = "", at_ms: int | None = None, **fields: Any) -> Entry:
    """Each brings ten."""
    values: dict[str, Any] = {
        "number": number,
        "transfer_id": f"transfer-{number}",
        "amount": Money(currency_code="CNY", minor_units=10),
        "balance_after": Money(currency_code="CNY", minor_units=10 * number),
        "counterparty_account_id": ALAN,
        "memo": memo,
        "create_time": timestamp(NOON_MS + (number * 1000 if at_ms is None else at_ms)),
    }
    return Entry(**{**values, **fields})


class FakeClient:
    """Serves entries, the newest first, and fails after so many pages."""

    served_by = home = "a"

    def __init__(self, served: Sequence[Entry], pages_max: int = 1000) -> None:
        self.served = served
        self.pages_max = pages_max
        self.pages = 0

    async def call(
        self, path: str, request: Message, _response: type[Message], login: Login
    ) -> ListEntriesResponse:
        assert (path, login) == ("TransferService/ListEntries", LOGIN)
        assert isinstance(request, ListEntriesRequest)
        assert request.account_id == ALICE
        if self.pages == self.pages_max:
            raise unreachable("a", ran=False)
        self.pages += 1
        before = int(request.page_token) if request.page_token else 10**9
        rest = [one for one in self.served if one.number < before]
        page, more = rest[: request.page_size], rest[request.page_size :]
        token = str(page[-1].number) if more else ""
        return ListEntriesResponse(entries=page, next_page_token=token)


def many(count: int) -> list[Entry]:
    return [entry(number) for number in range(count, 0, -1)]


async def read(client: FakeClient, wanted: Period = Period()) -> list[Entry]:  # noqa: B008 - immutable
    return [one async for one in entries(client, LOGIN, wanted)]  # type: ignore[arg-type] # a fake


@pytest.mark.parametrize("count", [0, 1, 100, 101, 250])
async def test_all_pages_are_read(count: int) -> None:
    assert await read(FakeClient(many(count))) == many(count)


@pytest.mark.parametrize(
    "served",
    [
        [entry(3), entry(1)],
        [entry(3), entry(2)],
        [entry(2), entry(2), entry(1)],
        [entry(2, balance_after=Money(currency_code="CNY", minor_units=21)), entry(1)],
        [*many(201)[:100], *many(201)[101:]],
    ],
    ids=["gap", "no beginning", "twice", "balance", "gap between pages"],
)
async def test_entries_that_do_not_join_are_a_failure(served: list[Entry]) -> None:
    with pytest.raises(Failure, match="STATEMENT_INCOMPLETE"):
        await read(FakeClient(served))


NOON = datetime.fromtimestamp(NOON_MS / 1000, UTC)
DAY_START_MS = int(datetime(NOON.year, NOON.month, NOON.day, tzinfo=UTC).timestamp() * 1000)


async def test_entries_of_moves_join_and_are_not_shown() -> None:
    """The account went to another home between its second and its third payment."""

    def moving(number: int, minor_units: int, left: int) -> Entry:
        return entry(
            number,
            amount=Money(currency_code="CNY", minor_units=minor_units),
            balance_after=Money(currency_code="CNY", minor_units=left),
            moved=True,
        )

    newest = entry(5, balance_after=Money(currency_code="CNY", minor_units=30))
    served = [newest, moving(4, 20, 20), moving(3, -20, 0), entry(2), entry(1)]
    assert [one.number for one in await read(FakeClient(served))] == [5, 2, 1]
    with pytest.raises(Failure, match="entry 3 is missing"):
        await read(FakeClient([newest, moving(4, 20, 20), entry(2), entry(1)]))


async def test_a_period_includes_its_first_and_its_last_day() -> None:
    at_ms = [-2 * DAY_MS, -1, 0, DAY_MS - 1, DAY_MS]
    served = [
        entry(number, at_ms=DAY_START_MS - NOON_MS + when) for number, when in enumerate(at_ms, 1)
    ][::-1]
    day = NOON.date().isoformat()

    async def numbers(since: str, until: str) -> list[int]:
        return [one.number for one in await read(FakeClient(served), period(since, until))]

    assert await numbers(day, day) == [4, 3]
    assert await numbers(day, "") == [5, 4, 3]
    assert await numbers("", day) == [4, 3, 2, 1]


async def test_reading_ends_well_before_the_period_and_a_clock_set_back_hides_nothing() -> None:
    """Entry 150's time is an hour too early: the clock was set right after it."""
    served = many(500)
    old = Period(since_ms=NOON_MS + 400_000)
    served[350] = entry(150, at_ms=500_000)
    assert [one.number for one in await read(FakeClient(served), old)] == [
        *range(500, 399, -1),
        150,
    ]
    client = FakeClient([entry(n, at_ms=(n - 500) * DAY_MS) for n in range(500, 0, -1)])
    assert len(await read(client, Period(since_ms=NOON_MS))) == 1
    assert client.pages == 1


@pytest.mark.parametrize(
    ("since", "until"), [("yesterday", ""), ("", "2026-13-01"), ("2026-11-25", "2026-11-24")]
)
def test_what_is_no_period_is_a_failure(since: str, until: str) -> None:
    with pytest.raises(Failure):
        period(since, until)


async def stream(*served: Entry) -> AsyncIterator[Entry]:
    for one in served:
        yield one


async def test_csv_is_what_rfc_4180_says() -> None:
    out = io.StringIO()
    await write_csv(out, stream(entry(1, 'rent, "May"\nand June'), entry(2, "租金")))
    assert out.getvalue() == (
        "number,time,amount_minor_units,balance_after_minor_units,currency,counterparty_account_id,"
        "transfer_id,memo\r\n"
        f"1,2030-03-17T17:46:41.000+00:00,10,10,CNY,{ALAN},transfer-1,"
        '"rent, ""May""\nand June"\r\n'
        f"2,2030-03-17T17:46:42.000+00:00,10,20,CNY,{ALAN},transfer-2,租金\r\n"
    )


@pytest.mark.parametrize(
    "memo",
    [
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "  =1",
        "\uff1d1",
        "\uff0b1",
        "\uff0d1",
        "\uff201",
    ],
)
async def test_a_memo_that_a_spreadsheet_would_run_gets_an_apostrophe(memo: str) -> None:
    out = io.StringIO(newline="")
    taken = entry(
        1, memo, transfer_id="-1-1-1-1", amount=Money(currency_code="CNY", minor_units=-5)
    )
    await write_csv(out, stream(taken))
    (row,) = csv.DictReader(io.StringIO(out.getvalue(), newline=""))
    assert row["memo"] == f"'{memo}"
    assert row["transfer_id"] == "'-1-1-1-1"
    assert row["amount_minor_units"] == "-5"  # a number is a number


@pytest.mark.parametrize("memo", ["", "rent", "a=b", "1-1", "'quoted'"])
def test_other_memos_stay_as_they_are(memo: str) -> None:
    assert defused(memo) == memo


async def test_a_memo_cannot_write_where_it_wants_on_a_terminal() -> None:
    out = io.StringIO()
    await write_table(out, stream(entry(1, "rent\x1b[2J\r\n 9 forged 租金")))
    heading, line = out.getvalue().splitlines()
    assert heading.split() == ["NO", "WHEN", "AMOUNT", "BALANCE", "CURRENCY", "WITH", "MEMO"]
    assert line.endswith(f"{ALAN}  rent [2J   9 forged 租金")


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_json_has_everything_as_it_is(count: int) -> None:
    out = io.StringIO()
    await write_json(out, stream(*(entry(number, "=1") for number in range(count, 0, -1))))
    found = json.loads(out.getvalue())["entries"]
    assert [one["number"] for one in found] == list(range(count, 0, -1))
    assert all(one["memo"] == "=1" for one in found)
    assert all(one["balance_after"]["currency_code"] == "CNY" for one in found)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "statement.csv"
    path.write_text("of last month")

    def fail_in_the_middle() -> None:
        with whole_file(path) as out:
            out.write("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_in_the_middle()
    assert path.read_text() == "of last month"
    with whole_file(path) as out:
        out.write("whole\r\n")
    assert path.read_bytes() == b"whole\r\n"
    assert path.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_takes_no_file_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(Failure), whole_file(tmp_path / "nowhere" / "statement.csv"):
        pass


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command at a fake mesh."""

    def run(client: FakeClient, *arguments: str) -> Any:
        class Connected:
            def __init__(self, *_: object) -> None: ...

            async def __aenter__(self) -> FakeClient:
                return client

            async def __aexit__(self, *_: object) -> None: ...

        monkeypatch.setattr(ops.client, "connected", Connected)
        return CliRunner().invoke(app, ["statement", "alice@example.com", *arguments])

    client_sessions = type("Sessions", (), {"of": staticmethod(lambda _user: LOGIN)})
    monkeypatch.setattr(FakeClient, "sessions", client_sessions, raising=False)
    return run


@pytest.mark.parametrize("form", ["csv", "json", "table"])
def test_the_command_writes_all_entries_to_a_file(run: Any, tmp_path: Path, form: str) -> None:
    path = tmp_path / "out"
    done = run(FakeClient(many(250)), "--format", form, "--output", str(path))
    assert (done.exit_code, done.output) == (0, "")
    assert len(path.read_text().splitlines()) == {"csv": 251, "json": 252, "table": 251}[form]
    to_stdout = run(FakeClient(many(250)), "-o", form)
    assert to_stdout.exit_code == 0
    assert to_stdout.stdout_bytes == path.read_bytes()


@pytest.mark.parametrize("form", ["csv", "json", "table"])
def test_a_failure_in_the_middle_leaves_no_file_and_an_exit_code(
    run: Any, tmp_path: Path, form: str
) -> None:
    client = FakeClient(many(250), pages_max=1)
    done = run(client, "--format", form, "--output", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert "CENTER_UNREACHABLE" in done.stderr
    assert client.pages == 1
    assert list(tmp_path.iterdir()) == []


def test_a_statement_from_a_copy_says_so(run: Any) -> None:
    client = FakeClient(many(1))
    client.served_by = "b"
    assert "from center b's copy" in run(client).stderr
