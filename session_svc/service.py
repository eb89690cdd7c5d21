"""The session service's RPCs."""

import asyncio

from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import (
    PASSWORD_OUTCOME_VERIFIED,
    EndOtherSessionsRequest,
    EndOtherSessionsResponse,
    EndOwnSessionRequest,
    EndOwnSessionResponse,
    ListOwnSessionsRequest,
    ListOwnSessionsResponse,
    VerifyPasswordRequest,
    VerifyPasswordResponse,
)
from duohuo.v1.session_service_pb2 import (
    GetSessionRequest,
    ListSessionsRequest,
    ListSessionsResponse,
    LoginRequest,
    LogoutRequest,
    LogoutResponse,
    RevokeSessionRequest,
    RevokeSessionResponse,
    RevokeSessionsRequest,
    RevokeSessionsResponse,
    Session,
)
from runtime import telemetry
from runtime.clock import timestamp
from runtime.dispatcher import Incoming
from runtime.endpoint import ask
from runtime.errors import RpcError, invalid, session_invalid
from runtime.identifiers import InvalidIdentifier, normalise
from runtime.ids import place_of
from runtime.methods import peer_method
from runtime.placement import slot_of
from runtime.token_seal import TokenSeal
from session_svc.guard import Guard, Trial
from session_svc.sessions import Sessions
from session_svc.store import NewSession, SessionRow, token_hash
from sync_bus.site import Site

DEVICE_LENGTH_MAX = 128
PEER_TIMEOUT_S = 2.0
_VERIFY = peer_method("account", "VerifyPassword")
_END_OWN = peer_method("session", "EndOwnSession")
_LIST_OWN = peer_method("session", "ListOwnSessions")


class SessionService:
    """Serves SessionService, and the session part of SessionPeerService."""

    def __init__(self, site: Site, sessions: Sessions, seal: TokenSeal, guard: Guard) -> None:
        self._seal = seal
        self._guard = guard
        self._site = site
        self._sessions = sessions

    async def Login(self, request: LoginRequest, incoming: Incoming) -> Session:
        if len(request.device) > DEVICE_LENGTH_MAX:
            raise invalid("device", f"must have at most {DEVICE_LENGTH_MAX} characters")
        try:
            identifier = normalise(request.identifier)
        except InvalidIdentifier:
            raise invalid("identifier", "is not an e-mail address or phone number") from None
        with self._guard.trial(identifier, request.device_proof, incoming.client_address) as trial:
            # Otherwise the same work for the same answer, by a password that fits nothing.
            password = request.password if trial.may_be_made else self._site.ids.secret()
            account_id = await self._prove(identifier, password, incoming.timeout_s, trial)
            trial.succeeded = True
        stamp, now_ms = self._site.stamps.now(), self._site.stamps.steady_ms()
        token = self._seal.token(self._site.here, self._site.ids.secret())
        session = SessionRow(
            f"{self._site.here}-{self._site.ids.unique()}",
            account_id,
            request.device,
            create_ms=now_ms,
            expire_ms=now_ms + self._sessions.lifetimes.absolute_ms,
            last_use_ms=now_ms,
        )
        await self._sessions.add(NewSession(token_hash(token), session, stamp))
        answer = self._answer(session)
        answer.token = token
        answer.device_proof = self._guard.proof(identifier, request.device_proof)
        return answer

    async def GetSession(self, request: GetSessionRequest, _incoming: Incoming) -> Session:
        place = place_of(request.token)
        session = None
        if place is not None and place.origin == self._site.here:
            session = await self._sessions.find(token_hash(request.token))
        if session is None:
            raise session_invalid()
        return self._answer(session)

    async def ListSessions(
        self, request: ListSessionsRequest, _incoming: Incoming
    ) -> ListSessionsResponse:
        answer = ListSessionsResponse()
        asked = ListOwnSessionsRequest(account_id=request.account_id)
        centers = [self._site.here, *self._site.mesh.peers]
        answers = await asyncio.gather(
            *(
                ask(
                    self._site.mesh.at(c), _LIST_OWN, asked, ListOwnSessionsResponse, PEER_TIMEOUT_S
                )
                for c in centers
            ),
            return_exceptions=True,
        )
        for center, found in zip(centers, answers, strict=True):
            if isinstance(found, RpcError):
                answer.unreachable_centers.append(center)
            elif isinstance(found, BaseException):
                raise found
            else:
                answer.sessions.extend(found.sessions)
        answer.sessions.sort(key=lambda session: session.create_time.ToNanoseconds(), reverse=True)
        return answer

    async def ListOwnSessions(
        self, request: ListOwnSessionsRequest, _incoming: Incoming
    ) -> ListOwnSessionsResponse:
        rows = await self._sessions.of_account(request.account_id)
        return ListOwnSessionsResponse(sessions=[self._answer(row) for row in rows])

    async def Logout(self, request: LogoutRequest, _incoming: Incoming) -> LogoutResponse:
        await self._sessions.remove(token_hash(request.token))
        return LogoutResponse()

    async def RevokeSession(
        self, request: RevokeSessionRequest, incoming: Incoming
    ) -> RevokeSessionResponse:
        origin = request.session_id.partition("-")[0]
        if origin not in (self._site.here, *self._site.mesh.peers):
            raise invalid("session_id", "must be a session's name, as sessions are listed")
        asked = EndOwnSessionRequest(account_id=request.account_id, session_id=request.session_id)
        timeout_s = min(incoming.timeout_s, PEER_TIMEOUT_S)
        try:
            await ask(self._site.mesh.at(origin), _END_OWN, asked, EndOwnSessionResponse, timeout_s)
        except RpcError as error:
            if origin == self._site.here:
                raise
            raise RpcError(
                StatusCode.UNAVAILABLE,
                "ORIGIN_UNREACHABLE",
                f"center {origin}, which made this session, does not answer now",
                ran=error.ran,
                retry_after_ms=5000,
                advice="Nobody can use it meanwhile. To end all sessions for good, end them together.",
            ) from error
        return RevokeSessionResponse()

    async def EndOwnSession(
        self, request: EndOwnSessionRequest, _incoming: Incoming
    ) -> EndOwnSessionResponse:
        await self._sessions.end(request.account_id, request.session_id)
        return EndOwnSessionResponse()

    async def EndOtherSessions(
        self, request: EndOtherSessionsRequest, _incoming: Incoming
    ) -> EndOtherSessionsResponse:
        self._site.require_believable_clock()
        stamp = self._site.stamps.now()
        await self._sessions.revoke_all(request.account_id, stamp, request.kept_session_id)
        return EndOtherSessionsResponse()

    async def RevokeSessions(
        self, request: RevokeSessionsRequest, _incoming: Incoming
    ) -> RevokeSessionsResponse:
        self._site.slot_of(request.account_id)
        # A revocation stamped too early would end nothing elsewhere, and yet be acknowledged.
        self._site.require_believable_clock()
        revoked = await self._sessions.revoke_all(request.account_id, self._site.stamps.now())
        return RevokeSessionsResponse(revoked=revoked)

    async def _prove(self, identifier: str, password: str, timeout_s: float, trial: Trial) -> str:
        """The account that the password opens: by the local copy, or by a second read at home, which may
        also have to confirm a password that was set lately.

        Home is that of the account, or of the identifier as long as nobody has said whose it is; an account
        may have identifiers that are at home elsewhere. While home cannot be asked, a password that does
        not fit the local copy may still be right (it may have been changed at home, or the account be
        new), so it is not called wrong.
        """
        asked = VerifyPasswordRequest(identifier=identifier, password=password)
        timeout_s = min(timeout_s, PEER_TIMEOUT_S)
        here = self._site.mesh.local
        try:
            found = await ask(here, _VERIFY, asked, VerifyPasswordResponse, timeout_s)
        except RpcError as error:
            # A copy that was lost with its disk knows nobody; home does.
            is_home = self._home(VerifyPasswordResponse(), identifier) == self._site.here
            if error.reason != "CENTER_RECOVERING" or is_home:
                raise
            found = VerifyPasswordResponse()
        trial.was_evaluated = True
        fitted_before, places = False, {self._site.here}
        while (home := self._home(found, identifier)) not in places:
            if _fits(found) and not self._is_recent(found):
                return found.account_id
            fitted_before = fitted_before or _fits(found)
            places.add(home)
            asked.account_id = found.account_id
            found = await self._read_at(home, asked, timeout_s)
        if _fits(found):
            return found.account_id
        if not fitted_before:
            raise _bad_credentials()
        raise RpcError(
            StatusCode.UNAVAILABLE,
            "HOME_CONFIRMATION_REQUIRED",
            f"this password was set lately, and center {home} has not heard of it yet",
            retry_after_ms=5000,
            advice="Try again in a moment.",
        )

    def _home(self, found: VerifyPasswordResponse, identifier: str) -> str:
        """Who has the last word on this password, as far as is known by now."""
        if found.account_id:
            return self._site.home_of(found.account_id)
        return self._site.placement.home(slot_of(identifier))

    async def _read_at(
        self, home: str, asked: VerifyPasswordRequest, timeout_s: float
    ) -> VerifyPasswordResponse:
        with telemetry.span("second read", {"duohuo.hop": "second-read", "duohuo.home": home}):
            try:
                return await ask(
                    self._site.mesh.at(home), _VERIFY, asked, VerifyPasswordResponse, timeout_s
                )
            except RpcError as error:
                if error.code is StatusCode.RESOURCE_EXHAUSTED:
                    raise  # home answers, and says when to come back
                raise RpcError(
                    StatusCode.UNAVAILABLE,
                    "HOME_CENTER_UNAVAILABLE",
                    f"only center {home}, which does not answer now, can check this password",
                    retry_after_ms=error.retry_after_ms or 5000,
                    advice="Try again in a moment; your password may still be right.",
                ) from error

    def _is_recent(self, verified: VerifyPasswordResponse) -> bool:
        """Must home confirm this password, because it was set so lately?"""
        age_ms = self._site.stamps.steady_ms() - verified.set_time_ms
        return age_ms < self._sessions.lifetimes.password_confirm_ms

    def _answer(self, session: SessionRow) -> Session:
        return Session(
            session_id=session.session_id,
            account_id=session.account_id,
            origin_center=self._site.here,
            device=session.device,
            create_time=timestamp(session.create_ms),
            expire_time=timestamp(session.expire_ms),
            last_use_time=timestamp(session.last_use_ms),
        )


def _fits(found: VerifyPasswordResponse) -> bool:
    return found.outcome == PASSWORD_OUTCOME_VERIFIED


def _bad_credentials() -> RpcError:
    return RpcError(
        StatusCode.UNAUTHENTICATED, "BAD_CREDENTIALS", "the identifier or the password is wrong"
    )
