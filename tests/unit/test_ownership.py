"""The .proto says whose account an RPC is about, and every way to name another one is refused alike."""

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import StatusCode

from runtime.dispatcher import Dispatcher
from runtime.endpoint import ACCOUNT, Call
from runtime.errors import RpcError
from runtime.hlc import HybridClock
from runtime.methods import PUBLIC_FILES, Method, methods_in
from tests.fakes import FakeClock, account

ALICE, BOB = account(1), account(2)
OTHERS = [BOB, account(3), "", "nobody", ALICE + " ", ALICE.upper() + "\0"]
OWNED = [one for one in methods_in(PUBLIC_FILES).values() if one.owner]
owned_rpcs = pytest.mark.parametrize("declared", OWNED, ids=lambda one: one.path)


class Everything:
    """Has every method of every service, and none of them may be reached."""

    def __getattr__(self, name: str) -> object:
        def reached(*_: object) -> object:
            raise RpcError(StatusCode.OK, "REACHED", name)

        return reached


async def answer(dispatcher: Dispatcher, declared: Method, request: bytes, caller: str) -> RpcError:
    """What a caller is told who must not succeed."""
    call = Call(declared, request, 1.0, {ACCOUNT: caller})
    answering = anext(dispatcher.stream(call)) if declared.streams else dispatcher.unary(call)
    with pytest.raises(RpcError) as refused:
        await answering
    return refused.value


def guarded() -> Dispatcher:
    made = Dispatcher("a", HybridClock(FakeClock()))
    for service in sorted({one.service for one in OWNED}):
        made.add(service, Everything())
    return made


def naming(declared: Method, owner: str) -> bytes:
    return declared.request_type(**{declared.owner: owner}).SerializeToString()


@owned_rpcs
async def test_an_own_account_gets_through(declared: Method) -> None:
    """Or else the refusals below would show nothing."""
    reached = await answer(guarded(), declared, naming(declared, ALICE), ALICE)
    assert (reached.reason, reached.message) == ("REACHED", declared.name)


@owned_rpcs
async def test_all_other_accounts_are_refused_alike_before_anything_is_looked_up(
    declared: Method,
) -> None:
    refused = [await answer(guarded(), declared, naming(declared, one), ALICE) for one in OTHERS]
    assert {(one.code, one.reason) for one in refused} == {
        (StatusCode.PERMISSION_DENIED, "NOT_YOURS")
    }
    assert len({one.to_status().SerializeToString(deterministic=True) for one in refused}) == 1


@owned_rpcs
async def test_an_owner_that_is_named_twice_is_the_last_one(declared: Method) -> None:
    twice = naming(declared, ALICE) + naming(declared, BOB)
    assert (await answer(guarded(), declared, twice, ALICE)).reason == "NOT_YOURS"


def test_an_rpc_that_declares_nothing_is_not_served() -> None:
    file = FileDescriptorProto(name="undeclared.proto", package="duohuo.test")
    file.message_type.add(name="Nothing")
    rpc = file.service.add(name="Undeclared").method.add(name="Open")
    rpc.input_type = rpc.output_type = ".duohuo.test.Nothing"
    pool = DescriptorPool()
    pool.Add(file)
    with pytest.raises(LookupError, match=r"Undeclared\.Open declares no access"):
        methods_in([pool.FindFileByName("undeclared.proto")])
