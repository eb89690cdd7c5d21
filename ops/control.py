"""How the `duohuo` command tells a running supervisor what to do.

One line of JSON each way over TCP on this machine: `{"token", "action", "arguments"}`, answered by
`{"ok": true, ...}` or `{"ok": false, "error": "a sentence for people"}`. The actions are listed with
the supervisor. The token is in `mesh.json`, which only the mesh's owner can read.
"""

import asyncio
import hmac
import json
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from ops.mesh_file import MeshView
from ops.ports import HOST

LINE_BYTES_MAX = 16 * 1024
REQUEST_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 60.0

Answer = dict[str, Any]
Handler = Callable[[str, Mapping[str, object]], Awaitable[Answer]]


class ControlError(Exception):
    """The supervisor did not do it. The message says why, to people."""


def request(mesh: MeshView, action: str, **arguments: object) -> Answer:
    """Has the supervisor do something and waits until it is done. Raises ControlError."""
    line = json.dumps({"token": mesh.control_token, "action": action, "arguments": arguments})
    host, _, port = mesh.supervisor.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), ANSWER_TIMEOUT_S) as connection:
            connection.sendall(line.encode() + b"\n")
            with connection.makefile("rb") as incoming:
                answer = json.loads(incoming.readline())
    except TimeoutError:
        raise ControlError(f"the mesh did not finish `{action}` in time") from None
    except (OSError, ValueError):
        raise ControlError(
            f"the mesh's supervisor does not answer on {mesh.supervisor}; is `duohuo up` still running?"
        ) from None
    if not answer.pop("ok"):
        raise ControlError(answer["error"])
    return dict(answer)


class ControlServer:
    """Takes requests for the supervisor. The handler raises ControlError or ValueError to refuse."""

    def __init__(self, token: str, handler: Handler) -> None:
        self._token = token
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def open(self, port: int) -> None:
        """Starts to listen. Raises OSError."""
        self._server = await asyncio.start_server(self._serve, HOST, port, limit=LINE_BYTES_MAX)

    async def close(self) -> None:
        """Stops listening; lets those who wait for an answer have it."""
        if self._server is not None:
            self._server.close()
        if self._serving:
            await asyncio.wait(self._serving, timeout=1.0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - this is a coroutine
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        answer = await self._answer(reader)
        with suppress(OSError):
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader) -> Answer:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                raw = json.loads(await reader.readline())
            token, action, arguments = str(raw["token"]), str(raw["action"]), dict(raw["arguments"])
        except (TimeoutError, OSError, ValueError, TypeError, KeyError, RecursionError):
            return _refusal("that is not a request to the supervisor")
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            return _refusal("the token is not this mesh's; is --state the right directory?")
        try:
            return {"ok": True, **await self._handler(action, arguments)}
        except (ControlError, ValueError) as error:
            return _refusal(str(error))
        except Exception as bug:  # noqa: BLE001 - the mesh must go on, and the caller be told
            traceback.print_exception(bug, file=sys.stderr)
            return _refusal(f"the supervisor failed at `{action}`: {type(bug).__name__}")


def _refusal(sentence: str) -> Answer:
    return {"ok": False, "error": sentence}
