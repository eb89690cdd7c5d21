"""One user who asks as fast as he can, in a process of his own: python -m ops.bench.flooder ADDRESS SECONDS

His account id and token come by standard input, a line each. Prints how many calls had which answer.
"""

import asyncio
import json
import sys
from collections import Counter

from duohuo.v1.account_service_pb2 import GetAccountRequest
from runtime.clock import SystemClock
from runtime.endpoint import AUTHORIZATION, Call
from runtime.errors import RpcError
from runtime.grpc_client import GrpcEndpoint
from runtime.methods import method

AT_A_TIME = 100
TIMEOUT_S = 10.0


async def flood(address: str, seconds: float, account_id: str, token: str) -> Counter[str]:
    """What came of it."""
    endpoint, clock = GrpcEndpoint("flooded", address), SystemClock()
    call = Call(
        method("/duohuo.v1.AccountService/GetAccount"),
        GetAccountRequest(account_id=account_id).SerializeToString(),
        TIMEOUT_S,
        {AUTHORIZATION: f"Bearer {token}"},
    )
    answers: Counter[str] = Counter()
    until_ms = clock.monotonic_ms() + seconds * 1000

    async def ask() -> None:
        while clock.monotonic_ms() < until_ms:
            try:
                await endpoint.unary(call)
                answers["OK"] += 1
            except RpcError as error:
                answers[error.reason] += 1

    try:
        await asyncio.gather(*(ask() for _ in range(AT_A_TIME)))
    finally:
        await endpoint.close()
    return answers


def main() -> None:
    """Floods, and says what came of it."""
    address, seconds = sys.argv[1:]
    account_id, token = sys.stdin.read().split()
    answers = asyncio.run(flood(address, float(seconds), account_id, token))
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
