"""Who gets through the operators' port, for what, and in whose name."""

import pytest
from grpc import StatusCode

from duohuo.v1.operator_service_pb2 import CenterStatus
from duohuo.v1.routing_pb2 import ACCESS_VIEWER
from gateway.operator_gate import OperatorGate
from runtime.endpoint import AUTHORIZATION, OPERATOR, Call
from runtime.errors import RpcError
from runtime.methods import OPERATOR_FILES, Method, method, methods_in
from runtime.operators import Operator, parse, token_hash
from tests.fakes import NOON_MS, FakeClock, RecordingEndpoint, says

METHODS = list(methods_in(OPERATOR_FILES).values())
GET_STATUS = method("/duohuo.v1.OperatorService/GetStatus")
ANN, VIC, OLD = "token-of-ann", "token-of-vic", "token-of-old"
HASH = token_hash("x")
FILE = f"""
ann operator {token_hash(ANN)} 2999-12-31
vic viewer {token_hash(VIC)}
old operator {token_hash(OLD)} 2030-03-16
"""
LAST_DAY_MS, DAY_MS = 1_899_936_000_000, 86_400_000
"""The 17th of March 2030 begins, and a day."""


class Port:
    """The gate, the file it reads, and what is behind it."""

    def __init__(self) -> None:
        self.file = FILE
        self.clock = FakeClock()
        self.behind = RecordingEndpoint(says(CenterStatus()))
        self.gate = OperatorGate(self.behind, self._read, self.clock)

    def _read(self) -> str:
        if not self.file:
            raise FileNotFoundError("gone")
        return self.file

    async def ask(self, authorization: str, called: Method = GET_STATUS) -> str:
        """In whose name it was done."""
        before = len(self.behind.calls)
        call = Call(called, b"", 1.0, {AUTHORIZATION: authorization, OPERATOR: "root"})
        await self.gate.unary(call)
        assert [message async for message in self.gate.stream(call)] == [b""]
        once, again = self.behind.calls[before:]
        assert once.metadata[OPERATOR] == again.metadata[OPERATOR]
        return once.metadata[OPERATOR]

    async def refusal(self, authorization: str, called: Method = GET_STATUS) -> RpcError:
        before = len(self.behind.calls)
        with pytest.raises(RpcError) as refused:
            await self.ask(authorization, called)
        assert len(self.behind.calls) == before
        return refused.value


async def test_who_acts_is_said_by_the_token_alone() -> None:
    assert await Port().ask(f"Bearer {ANN}") == "ann"
    assert await Port().ask(f"Bearer {VIC}") == "vic"


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", ANN, f"Bearer {ANN} ", f"Bearer {ANN.upper()}", f"Bearer {ANN[:-1]}",
     "Bearer öperator", f"Bearer {token_hash(ANN)}", f"bearer {ANN}"],
)  # fmt: skip
async def test_anybody_else_is_refused(authorization: str) -> None:
    refused = await Port().refusal(authorization)
    assert (refused.code, refused.reason) == (StatusCode.UNAUTHENTICATED, "OPERATOR_TOKEN_INVALID")


@pytest.mark.parametrize("called", METHODS, ids=lambda one: one.name)
async def test_a_viewer_looks_and_an_operator_acts_too(called: Method) -> None:
    port = Port()
    assert await port.ask(f"Bearer {ANN}", called) == "ann"
    if called.access == ACCESS_VIEWER:
        assert await port.ask(f"Bearer {VIC}", called) == "vic"
    else:
        refused = await port.refusal(f"Bearer {VIC}", called)
        assert (refused.code, refused.reason) == (StatusCode.PERMISSION_DENIED, "OPERATOR_ROLE")


async def test_a_token_ends_with_its_last_day() -> None:
    port = Port()
    port.clock.jump(LAST_DAY_MS - NOON_MS - 1)
    assert await port.ask(f"Bearer {OLD}") == "old"
    port.clock.jump(1)
    assert (await port.refusal(f"Bearer {OLD}")).reason == "OPERATOR_TOKEN_INVALID"


async def test_a_change_of_the_file_counts_at_once() -> None:
    port = Port()
    assert await port.ask(f"Bearer {VIC}") == "vic"
    port.file = Operator("eve", "viewer", token_hash("token-of-eve")).line()
    assert (await port.refusal(f"Bearer {VIC}")).reason == "OPERATOR_TOKEN_INVALID"
    assert await port.ask("Bearer token-of-eve") == "eve"


@pytest.mark.parametrize("file", ["", "ann operator"])
async def test_a_file_that_cannot_be_read_lets_nobody_in(file: str) -> None:
    port = Port()
    port.file = file
    refused = await port.refusal(f"Bearer {ANN}")
    assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "OPERATORS_UNREADABLE")


@pytest.mark.parametrize(
    "line",
    ["ann", f"ann admin {HASH}", f"Ann viewer {HASH}", "ann viewer token", f"ann viewer {HASH} soon",
     f"ann viewer {HASH} 2030-01-01 more", f"ann viewer {HASH}\nann operator {HASH}"],
)  # fmt: skip
def test_a_line_that_is_not_in_order_is_named_and_not_repeated(line: str) -> None:
    with pytest.raises(ValueError, match=r"^line \d (is not|repeats)") as wrong:
        parse(line)
    assert HASH not in str(wrong.value)


def test_what_is_written_is_what_is_read() -> None:
    assert parse("\n".join(one.line() for one in parse(FILE))) == parse(FILE)
