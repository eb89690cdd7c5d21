"""A service in another process that does not answer is not its center that does not."""

import pytest

from runtime.center import LocalCenter
from runtime.dispatcher import Dispatcher
from runtime.endpoint import Call
from runtime.errors import RpcError, unreachable
from runtime.hlc import HybridClock
from runtime.methods import method
from tests.fakes import FakeClock, RecordingEndpoint, fails

CALL = Call(method("/duohuo.v1.AccountService/GetAccount"), b"", 1.0)
SAID_OF_ANOTHER = RpcError.from_status(unreachable("b", ran=True).to_status())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (unreachable("a", ran=True), "ROLE_UNREACHABLE"),
        (SAID_OF_ANOTHER, "CENTER_UNREACHABLE"),
    ],
    ids=["it is silent", "it says that another center is"],
)
async def test_only_silence_is_the_services_own(error: RpcError, reason: str) -> None:
    dispatcher = Dispatcher("a", HybridClock(FakeClock()))
    center = LocalCenter(dispatcher, {"account": RecordingEndpoint(fails(error))})
    with pytest.raises(RpcError) as refused:
        await center.unary(CALL)
    assert (refused.value.reason, refused.value.ran) == (reason, True)
    with pytest.raises(RpcError, match=reason):
        await anext(center.stream(CALL))


async def test_what_a_service_in_this_process_says_stays_as_it_is() -> None:
    center = LocalCenter(Dispatcher("a", HybridClock(FakeClock())), {})
    with pytest.raises(RpcError, match="NOT_SERVED_HERE"):
        await center.unary(CALL)
