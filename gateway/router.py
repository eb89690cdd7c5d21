"""Takes a call to a center that may answer it, within the caller's deadline.

A call is sent on to the next center only if it definitely did not run, or is safe to run twice. The
request stays bytes; only its key is read.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from grpc import StatusCode

from duohuo.v1.routing_pb2 import ACCESS_USER
from gateway.announcements import Announcements
from gateway.authenticator import Authenticator, bad_key
from gateway.health import Health
from gateway.limits import Limiter
from gateway.routes import KeyMissing, Target, targets
from runtime import telemetry
from runtime.clock import Clock
from runtime.endpoint import (
    ACCOUNT,
    AUTHORIZATION,
    CAUSAL,
    CLIENT,
    CLIENT_ADDRESS,
    EPOCH,
    GATEWAY,
    HOP,
    SESSION,
    Call,
    Reply,
)
from runtime.errors import RpcError, invalid
from runtime.home_calls import WRONG_HOME, named_home, slot_moving, wait_s
from runtime.ids import place_of
from runtime.mesh import Mesh
from runtime.methods import Method
from runtime.placement import Placement
from runtime.store import DISK_FULL
from runtime.wire import MalformedMessage, string_field

FAILOVER_TIMEOUT_S = 2.0
ANSWER_MARGIN_S = 0.1
"""Kept of the caller's deadline, so that a caller hears what happened instead of running out of time."""
RETRY_AFTER_MS = 5000
SESSION_RECHECK_S = 2.0
_OUTAGE = frozenset({StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED})
_SAYS_ENOUGH = frozenset(
    {
        "NOT_COPIED_YET",
        "CENTER_RECOVERING",
        DISK_FULL,
        "STORE_UNAVAILABLE",
    }
)
_ELSEWHERE = _SAYS_ENOUGH | {
    "CENTER_UNREACHABLE",
    "ROLE_UNREACHABLE",
    "DEADLINE_EXCEEDED",
    "CLOCK_WRONG",
}


class Router:
    """Users' calls, as an endpoint."""

    def __init__(
        self,
        mesh: Mesh,
        placement: Placement,
        authenticator: Authenticator,
        clock: Clock,
        limiter: Limiter,
        announcements: Announcements,
        health: Health,
    ) -> None:
        self._mesh = mesh
        self._placement = placement
        self._authenticator = authenticator
        self._clock = clock
        self._limiter = limiter
        self._announcements = announcements
        self._health = health

    async def unary(self, call: Call) -> Reply:
        self._limiter.count_address(call.metadata.get(CLIENT, ""))
        timeout_s = max(call.timeout_s - ANSWER_MARGIN_S, call.timeout_s / 2)
        deadline_ms = self._clock.monotonic_ms() + int(timeout_s * 1000)
        wanted, slot = self._targets(call)
        try:
            return await self._first_answer(call, wanted, slot, deadline_ms)
        except RpcError as error:
            self._announce(error, wanted, slot)
            raise

    async def _first_answer(
        self, call: Call, wanted: Sequence[Target], slot: int | None, deadline_ms: int
    ) -> Reply:
        metadata = await self._metadata(call, slot)
        asked: list[Target] = []
        errors: list[RpcError] = []
        left = self._health.ordered(wanted, call.method)
        trips = 0
        while left:
            target = left.pop(0)
            left_s = (deadline_ms - self._clock.monotonic_ms()) / 1000
            timeout_s = min(left_s / 2, FAILOVER_TIMEOUT_S) if left else left_s
            hop = Call(call.method, call.request, timeout_s, {**metadata, HOP: target.hop})
            trips += 1
            try:
                return await self._ask(target, self._home(slot), hop, trips)
            except RpcError as error:
                if error.reason == WRONG_HOME and slot is not None:
                    pause_s = wait_s(trips)
                    if pause_s > left_s / 2:
                        raise slot_moving(slot) from error
                    named = named_home(error, slot, self._placement)
                    await asyncio.sleep(pause_s)
                    left.insert(
                        0, Target(named, "local" if named == self._mesh.here else "forwarded")
                    )
                    continue
                # What this center refused, one asked before it may have done.
                error.ran = error.ran or any(earlier.ran for earlier in errors)
                # What a copy has not is not certain while whoever would know does not answer.
                uncertain = error.code is StatusCode.NOT_FOUND and len(errors) > 0
                if error.reason not in _ELSEWHERE and not uncertain:
                    raise
                asked.append(target)
                errors.append(error)
                if error.ran and not call.method.safe_to_repeat:
                    break
        raise self._unanswered(call.method, asked, errors)

    async def stream(self, call: Call) -> AsyncIterator[bytes]:
        self._limiter.count_address(call.metadata.get(CLIENT, ""))
        wanted, slot = self._targets(call)
        try:
            async with aclosing(self._first_stream(call, wanted, slot)) as messages:
                async for message in messages:
                    yield message
        except RpcError as error:
            self._announce(error, wanted, slot)
            raise

    async def _first_stream(
        self, call: Call, wanted: Sequence[Target], slot: int | None
    ) -> AsyncGenerator[bytes, None]:
        metadata = await self._metadata(call, slot)
        target = next((t for t in wanted if self._mesh.reachable(t.center)), wanted[0])
        hop = Call(call.method, call.request, call.timeout_s, {**metadata, HOP: target.hop})
        with self._limiter.stream(metadata.get(ACCOUNT) or call.metadata.get(CLIENT, "")):
            async with aclosing(self._mesh.stream(target.center, hop)) as messages:  # type: ignore[type-var] # a generator
                async for message in self._while_session_lasts(call, messages):
                    yield message

    async def _while_session_lasts(
        self, call: Call, messages: AsyncIterator[bytes]
    ) -> AsyncIterator[bytes]:
        """Passes messages on, and asks now and then whether the caller's session is still good."""
        if call.method.access != ACCESS_USER:
            async for message in messages:
                yield message
            return
        checked_ms = self._clock.monotonic_ms()
        arriving = asyncio.ensure_future(anext(messages, None))
        try:
            while True:
                await asyncio.wait([arriving], timeout=SESSION_RECHECK_S)
                if self._clock.monotonic_ms() - checked_ms >= SESSION_RECHECK_S * 1000:
                    await self._authenticator.caller_of(call, self)
                    checked_ms = self._clock.monotonic_ms()
                if not arriving.done():
                    continue
                arrived = arriving.result()
                if arrived is None:
                    return
                yield arrived
                arriving = asyncio.ensure_future(anext(messages, None))
        finally:
            arriving.cancel()
            await asyncio.wait([arriving])

    async def _ask(self, target: Target, home: str, call: Call, attempt: int) -> Reply:
        with telemetry.span(
            f"route {call.method.name}",
            {
                "duohuo.role": "gateway",
                "duohuo.center": self._mesh.here,
                "duohuo.home": home,
                "duohuo.target": target.center,
                "duohuo.hop": target.hop,
                "duohuo.attempt": attempt,
            },
        ):
            async with self._health.asking(target.center, call) as admitted:
                return await self._mesh.unary(target.center, admitted)

    def _home(self, slot: int | None) -> str:
        return "" if slot is None else self._placement.home(slot)

    def _targets(self, call: Call) -> tuple[tuple[Target, ...], int | None]:
        """Whom to ask, and the slot of the key, if it names one."""
        number = call.method.key_number
        try:
            key = string_field(call.request, number) if number else ""
        except MalformedMessage:
            raise invalid("", "the request is not a valid protobuf message", "MALFORMED") from None
        if call.method.key == "token":
            self._authenticator.origin_of(key)
        place = place_of(key) if key else None
        try:
            wanted = targets(call.method.policy, place, self._mesh.here, self._placement)
        except KeyMissing:
            raise bad_key(call.method) from None
        if any(target.center not in self._placement.centers for target in wanted):
            raise bad_key(call.method)
        return wanted, place.slot if place else None

    async def _metadata(self, call: Call, slot: int | None) -> dict[str, str]:
        epoch = self._placement.epoch if slot is None else self._placement.epoch_of(slot)
        metadata = {EPOCH: str(epoch), GATEWAY: self._mesh.here}
        if causal := call.metadata.get(CAUSAL):
            metadata[CAUSAL] = causal
        if call.method.access == ACCESS_USER:
            token = call.metadata.get(AUTHORIZATION, "")
            self._limiter.check(token)
            metadata[ACCOUNT], metadata[SESSION] = await self._authenticator.caller_of(call, self)
            self._limiter.count_user(metadata[ACCOUNT], token)
        elif address := call.metadata.get(CLIENT):
            metadata[CLIENT_ADDRESS] = address
        return metadata

    def _announce(self, error: RpcError, wanted: Sequence[Target], slot: int | None) -> None:
        """An error that comes from an outage says what users are told of it."""
        of_outage = error.code in _OUTAGE or error.reason == DISK_FULL or "center" in error.details
        if of_outage and not error.announcements:
            asked = {wanted[0].center} | ({self._home(slot)} if slot is not None else set())
            error.announcements = tuple(self._announcements.in_force(asked))

    def _unanswered(self, method: Method, asked: list[Target], errors: list[RpcError]) -> RpcError:
        """What the caller is told when no center that may answer has answered."""
        last = errors[-1]
        ran = any(error.ran for error in errors)
        declared = method.unavailable
        if last.reason == "DEADLINE_EXCEEDED" and not declared.relogin:
            return RpcError(
                last.code,
                "DEADLINE_EXCEEDED",
                f"center {asked[-1].center} did not answer in time",
                ran=ran,
                advice="Ask again with the same id: it will not run twice." if ran else "",
            )
        if last.reason in _SAYS_ENOUGH and all(error.reason == last.reason for error in errors):
            return last
        for error in errors:
            if error.reason == "CLOCK_WRONG":
                error.ran = ran
                return error
        silent = (
            target.center
            for target, error in zip(asked, errors, strict=True)
            if error.reason != "NOT_COPIED_YET"
        )
        center = next(silent, asked[0].center)
        message = f"center {center} does not answer now"
        if ran:
            message += "; the request may have run: ask again with the same id"
        return RpcError(
            StatusCode.UNAUTHENTICATED if declared.relogin else StatusCode.UNAVAILABLE,
            declared.reason or "HOME_CENTER_UNAVAILABLE",
            message,
            ran=ran,
            retry_after_ms=None if declared.relogin else RETRY_AFTER_MS,
            advice=declared.advice,
            details={"center": center},
        )
