"""Random and mutated bytes against the real services: python -m tests.fuzz --inputs 1000000 --seed 1

Two simulated centers without faults take inputs on three ways: users' and operators' RPCs, entries of the
log, and other centers' RPCs. Each input is a message with plausible and extreme values, one with its bytes
damaged, or rubbish. Each must be answered, and never by INTERNAL or UNKNOWN; no answer may repeat what is
secret; all the time the books must be right, and after what users and operators may send, all centers must
agree.

Episodes of a few thousand inputs each begin anew, so that any can be run again by its seed.
"""

import argparse
import asyncio
import logging
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import structlog
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from grpc import StatusCode

from duohuo.internal.v1.log_pb2 import LogRecord
from duohuo.v1.account_service_pb2 import Account, RegisterRequest
from duohuo.v1.money_pb2 import Money
from duohuo.v1.session_service_pb2 import LoginRequest, Session
from duohuo.v1.transfer_service_pb2 import Application, ApplyTransferRequest
from gateway.limits import Limits
from ops import verify
from ops.simulation import checks
from ops.simulation.loop import SimulatedLoop
from ops.simulation.world import World
from runtime.endpoint import ACCOUNT, AUTHORIZATION, CAUSAL, OPERATOR, Call, Endpoint, ask
from runtime.errors import RpcError
from runtime.methods import OPERATOR_FILES, PEER_FILES, PUBLIC_FILES, Method, method, methods_in

EPISODE = 5_000
AT_A_TIME = 20
TIMEOUT_S = 2.0
STREAM_S = 0.05
AGREED_WITHIN_S = 600.0
DEPTH_MAX = 4
CHECKED = 0.02
"""How often, after some inputs, the books are looked at."""
ENTRIES_SEEN_MAX = 500
SERVICES = ("account", "session", "transfer")
SECRET = "kanarienpasswort"
FORBIDDEN = (StatusCode.INTERNAL, StatusCode.UNKNOWN)
INTEGERS = (0, 1, -1, 2, 7, 100, 4095, 4096, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 10**18)
TEXTS = (
    "",
    "x",
    "\0",
    "é",
    "日本",
    "' OR 1=1 --",
    "x" * 10_000,
    "a\r\nb",
    "\u202e",
    "0" * 32,
    "../..",
)
TOPICS = ("accounts", "changes", "ledger", "applications", "revocations", "transfer_audit")


class Episode:
    """One mesh, its users, and what came of the inputs so far."""

    def __init__(self, world: World, random: Random) -> None:
        self.world = world
        self.random = random
        self.counts: Counter[tuple[str, str]] = Counter()
        self.broken: list[str] = []
        self.tokens: list[str] = []
        self.accounts: list[str] = []
        self.entries_seen: list[tuple[str, str, bytes]] = []
        """Role, topic and record."""
        self.words: dict[str, list[str]] = {
            "account_id": self.accounts,
            "token": self.tokens,
            "identifier": [f"user{n}@example.com" for n in range(4)],
            "application_id": [],
            "_id": [f"fuzz-{n:05}" for n in range(50)],
            "password": [SECRET],
            "currency": ["CNY", "JPY", "EUR"],
            "center": ["a", "b", "c"],
            "source": ["a", "b", "c"],
            "destination": ["a", "b", "c"],
            "topic": list(TOPICS),
        }

    async def prepare(self) -> None:
        """Users with money and sessions, and an application to look at."""
        for name in self.world.names:
            self.world.start(name)
        names = self.world.names
        while any(self.world.undisturbed(name) is None for name in names):  # noqa: ASYNC110 - as users do
            await asyncio.sleep(0.1)
        gateway = self.world.gateway("a")
        for number, identifier in enumerate(self.words["identifier"]):
            register = RegisterRequest(
                identifier=identifier, password=SECRET, request_id=f"register-{number}"
            )
            account = await ask(gateway, _rpc("AccountService/Register"), register, Account, 5.0)
            self.accounts.append(account.account_id)
            home = account.home_center
            await self.world.deposit(home, f"deposit-{number}", account.account_id, 10_000)
            login = LoginRequest(identifier=identifier, password=SECRET)
            session = await ask(gateway, _rpc("SessionService/Login"), login, Session, 5.0)
            self.tokens.append(session.token)
        apply = ApplyTransferRequest(
            transfer_id="fuzz-application",
            payer_account_id=self.accounts[0],
            payee_account_id=self.accounts[1],
            amount=Money(currency_code="CNY", minor_units=5),
        )
        bearer = {AUTHORIZATION: f"Bearer {self.tokens[0]}"}
        made = await ask(
            gateway, _rpc("TransferService/ApplyTransfer"), apply, Application, 5.0, bearer
        )
        self.words["application_id"].append(made.application_id)

    async def calls(self, kind: str, inputs: int) -> None:
        """So many inputs to the RPCs of a kind, some at a time."""
        declared = list(methods_in(_FILES[kind]).values())
        for _ in range(0, inputs, AT_A_TIME):
            await asyncio.gather(
                *(self._one(kind, self.random.choice(declared)) for _ in range(AT_A_TIME))
            )
            if self.random.random() < CHECKED:
                self.broken += checks.during(self.world)
            if kind == "user" and len(self.entries_seen) < ENTRIES_SEEN_MAX:
                self.entries_seen += (
                    (role, topic, record)
                    for role in SERVICES
                    for topic, record in self.world.disk("a").rows(
                        role, "SELECT topic, record FROM log"
                    )
                )

    async def entries(self, inputs: int) -> None:
        """So many entries in a's log, which b has to take or to park; and it goes on."""
        disk = self.world.disk("a")
        for number in range(inputs):
            role, topic, record = self.random.choice(self.entries_seen)
            damaged = self._record(record)
            if _claims_a_slot(damaged):
                continue  # nobody gave it that slot: it waits for ever, and what it says afterwards with it
            disk.alter(role, "UPDATE log_head SET seq = seq + 1 WHERE topic = ?", topic)
            disk.alter(
                role,
                "INSERT INTO log SELECT topic, seq, ? FROM log_head WHERE topic = ?",
                damaged,
                topic,
            )
            if number % 100 == 0:
                await asyncio.sleep(1)
        topics = dict.fromkeys((role, topic) for role, topic, _ in self.entries_seen)
        for role, topic in topics:
            ((head,),) = disk.rows(role, "SELECT seq FROM log_head WHERE topic = ?", topic)
            reached = "SELECT 1 FROM cursor WHERE source = 'a' AND topic = ? AND seq = ?"
            deadline_s = self.world.now_s() + AGREED_WITHIN_S
            while not self.world.disk("b").rows(role, reached, topic, head):
                if self.world.now_s() > deadline_s:
                    self.broken.append(f"entries of {topic} are stuck at b")
                    break
                await asyncio.sleep(1)
        for role in SERVICES:
            ((parked,),) = self.world.disk("b").rows(role, "SELECT count(*) FROM parked")
            self.counts["entry", "parked"] += parked
        self.counts["entry", "applied"] += inputs - self.counts["entry", "parked"]

    async def agree(self) -> None:
        """Whatever users and operators have sent, all centers come to hold the same."""
        deadline_s = self.world.now_s() + AGREED_WITHIN_S
        while True:
            report = verify.judge(await self.world.facts(), self.world.names)
            if report.passed or self.world.now_s() > deadline_s:
                break
            await asyncio.sleep(1)
        if not report.passed:
            self.broken.append(f"no agreement: {report.text()}")

    async def _one(self, kind: str, called: Method) -> None:
        request = self._bytes(called.request_type)
        metadata = {
            AUTHORIZATION: f"Bearer {self.random.choice([*self.tokens, 'x', ''])}",
            **({CAUSAL: self._text("causal")} if self.random.random() < 0.02 else {}),
        }
        center = self.random.choice(self.world.names)
        endpoint: Endpoint | None = self.world.gateway(center)
        if kind != "user":
            endpoint = self.world.centers[center].dispatcher
            metadata = {OPERATOR: "fuzz", ACCOUNT: self.random.choice(self.accounts)}
        assert endpoint is not None
        call = Call(called, request, TIMEOUT_S, metadata)
        status = "OK"
        try:
            if called.streams:
                await _first(endpoint, call)
            else:
                await endpoint.unary(call)
        except RpcError as error:
            status = error.code.name
            said = f"{error.message} {error.advice} {dict(error.details)}"
            if any(secret in said for secret in (SECRET, *self.words["identifier"], *self.tokens)):
                self.broken.append(f"{called.path} repeats a secret: {error.reason}")
            if error.code in FORBIDDEN:
                self.broken.append(f"{called.path} {error.code.name} on {request!r:.500}")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            self.broken.append(f"{called.path} {error!r} on {request!r:.500}")
        self.counts[kind, status] += 1

    def _record(self, record: bytes) -> bytes:
        if self.random.random() < 0.5:
            return self._damaged(record)
        made = LogRecord()
        self._fill(made, 0)
        if made.HasField("account_erased"):
            # Home is believed that an account is gone, and then also that another one has its identifier.
            made.ClearField("account_erased")
        made.hlc = LogRecord.FromString(record).hlc
        return made.SerializeToString()

    def _bytes(self, wanted: type[Message]) -> bytes:
        if self.random.random() < 0.1:
            return self.random.randbytes(self.random.randrange(200))
        made = wanted()
        self._fill(made, 0)
        whole = made.SerializeToString()
        return self._damaged(whole) if self.random.random() < 0.4 else whole

    def _damaged(self, whole: bytes) -> bytes:
        data = bytearray(whole)
        for _ in range(self.random.randint(1, 4)):
            at = self.random.randrange(len(data) + 1)
            match self.random.randrange(5):
                case 0 if data:
                    data[at % len(data)] ^= 1 << self.random.randrange(8)
                case 1:
                    del data[at:]
                case 2:
                    data[at:at] = data[self.random.randrange(len(data) + 1) :][:50]
                case 3:
                    data[at:at] = self.random.randbytes(self.random.randint(1, 8))
                case _:
                    data += b"\xfa\x3f\x03\xff\xfe\xfd"  # an unknown field
        return bytes(data)

    def _fill(self, message: Message, depth: int) -> None:
        for field in message.DESCRIPTOR.fields:
            if self.random.random() < 0.2:
                continue
            if field.is_repeated:
                self._fill_many(message, field, depth)
            elif field.message_type is not None:
                if depth < DEPTH_MAX:
                    self._fill(getattr(message, field.name), depth + 1)
            else:
                setattr(message, field.name, self._value(field))

    def _fill_many(self, message: Message, field: Any, depth: int) -> None:
        many = getattr(message, field.name)
        for _ in range(self.random.choice((0, 1, 2, 50))):
            if field.message_type is None:
                many.append(self._value(field))
            elif field.message_type.GetOptions().map_entry:
                value = field.message_type.fields_by_name["value"]
                if value.message_type is None:
                    many[self._text("topic")] = self._value(value)
            elif depth < DEPTH_MAX:
                self._fill(many.add(), depth + 1)

    def _value(self, field: Any) -> Any:
        kind = field.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING:
            text = self._text(field.name)
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self.random.random() < 0.5
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            return self.random.choice((0, 1, 2, 3, 99, -1))
        if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            return self.random.choice((0.0, -1.0, float("nan"), float("inf"), 1e300))
        value = self.random.choice((*INTEGERS, self.random.randrange(100)))
        bits = 32 if "32" in _NAMES[kind] else 64
        if _NAMES[kind].startswith("U"):
            return value % 2**bits
        return max(-(2 ** (bits - 1)), min(value, 2 ** (bits - 1) - 1))

    def _text(self, name: str) -> str:
        """Something that belongs there, mostly."""
        fitting = next((words for end, words in self.words.items() if name.endswith(end)), None)
        if fitting and self.random.random() < 0.85:
            return self.random.choice(fitting)
        return self.random.choice((*TEXTS, *self.accounts, *self.words["_id"]))


_FILES = {
    "user": PUBLIC_FILES,
    "operator": OPERATOR_FILES,
    "peer": PEER_FILES,
}
_NAMES = {
    FieldDescriptor.CPPTYPE_INT32: "INT32",
    FieldDescriptor.CPPTYPE_INT64: "INT64",
    FieldDescriptor.CPPTYPE_UINT32: "UINT32",
    FieldDescriptor.CPPTYPE_UINT64: "UINT64",
}


def _claims_a_slot(record: bytes) -> bool:
    try:
        return LogRecord.FromString(record).HasField("slot_taken_over")
    except DecodeError:
        return False


def _rpc(name: str) -> Method:
    return method(f"/duohuo.v1.{name}")


async def _first(endpoint: Endpoint, call: Call) -> None:
    """The beginning of a stream, if there is one soon."""
    try:
        async with asyncio.timeout(STREAM_S), aclosing(endpoint.stream(call)) as messages:  # type: ignore[type-var] # generators
            async for _ in messages:
                break
    except TimeoutError:
        return


async def _scenario(episode: Episode, inputs: int) -> None:
    await episode.prepare()
    await episode.calls("user", inputs * 5 // 10)
    await episode.calls("operator", inputs // 10)
    await episode.agree()
    await episode.entries(inputs * 2 // 10)
    episode.broken += checks.during(episode.world)
    await episode.calls("peer", inputs * 2 // 10)
    episode.broken += checks.during(episode.world)
    episode.broken += [f"crash: {crash}" for crash in episode.world.crashes]
    episode.broken += [f"escaped: {escaped}" for escaped in episode.world.loop.escaped]


def run_episode(
    seed: int, inputs: int = EPISODE
) -> tuple[int, Counter[tuple[str, str]], list[str]]:
    """The seed, how many inputs had which outcome, and what went wrong."""
    logged = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    memory = Path("/dev/shm")  # noqa: S108 - a private directory is made in it
    directory = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    loop = SimulatedLoop(f"fuzz {seed}")
    asyncio.set_event_loop(loop)
    world = World(f"fuzz {seed}", ["a", "b"], loop, directory)
    world.limits = Limits(1_000_000, 1_000_000, 1_000)
    try:
        episode = Episode(world, Random(f"fuzz {seed}"))  # noqa: S311 - inputs may be guessed
        loop.run(_scenario(episode, inputs))
        return seed, episode.counts, list(dict.fromkeys(episode.broken))
    finally:
        for center in world.centers.values():
            center.disk.crash()
        asyncio.set_event_loop(None)
        structlog.configure(**logged)
        shutil.rmtree(directory, ignore_errors=True)


def run(
    inputs: int, first: int, processes: int
) -> Iterator[tuple[int, Counter[tuple[str, str]], list[str]]]:
    """Episodes until so many inputs have been tried."""
    seeds = range(first, first + -(-inputs // EPISODE))
    with get_context("spawn").Pool(processes, maxtasksperchild=4) as pool:
        yield from pool.imap_unordered(partial(run_episode), seeds)


def main() -> int:
    """Tries inputs, and tells of each episode that found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1, help="The first episode's.")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    total: Counter[tuple[str, str]] = Counter()
    failed = False
    for seed, counts, broken in run(given.inputs, given.seed, given.processes):
        total += counts
        failed = failed or bool(broken)
        found = "; ".join(broken[:5]) or "well"
        sys.stdout.write(f"{total.total()} inputs; seed {seed}: {found}\n")
        sys.stdout.flush()
    for (kind, status), count in sorted(total.items()):
        sys.stdout.write(f"{kind:9} {status:20} {count}\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
