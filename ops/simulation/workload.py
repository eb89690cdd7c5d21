"""What users do: every public RPC, some users far more than others, retrying what may have run.

Each user is one client that does one thing after another, at any gateway, and carries the causal token
from call to call as our own client does.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from account_svc.registry import ATTACHED, DETACHED, identifier_field
from duohuo.v1.account_service_pb2 import (
    Account,
    AddIdentifierRequest,
    ChangePasswordRequest,
    ChangePasswordResponse,
    GetAccountRequest,
    Notification,
    Profile,
    RegisterRequest,
    RemoveIdentifierRequest,
    SetNotificationRequest,
    UpdateProfileRequest,
)
from duohuo.v1.money_pb2 import Money
from duohuo.v1.session_service_pb2 import (
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
from duohuo.v1.transfer_service_pb2 import (
    Application,
    ApplyTransferRequest,
    Balance,
    CancelApplicationRequest,
    CaptureHoldRequest,
    CaptureHoldResponse,
    GetBalanceRequest,
    Hold,
    ListApplicationsRequest,
    ListApplicationsResponse,
    ListEntriesRequest,
    ListEntriesResponse,
    ReleaseHoldRequest,
    ReserveFundsRequest,
    TransferRequest,
    TransferResult,
)
from ops.simulation.courier import SECRET, WEBHOOK_URL
from ops.simulation.history import History, Operation, Outcome
from ops.simulation.stage import Stage
from runtime.clock import timestamp
from runtime.endpoint import AUTHORIZATION, CAUSAL, SERVED_BY, Call
from runtime.errors import RpcError
from runtime.methods import method
from runtime.placement import slot_of
from session_svc.store import token_hash

M = TypeVar("M", bound=Message)
CALL_TIMEOUT_S = 5.0
INSIST_S = 0.5
ATTEMPTS_MAX = 5
CURRENCY = "CNY"
HOLDS_LAST_MS = (2_000, 8_000, 30_000)
SECRETS = ("secret-", "@example.com")


@dataclass(slots=True)
class User:
    """What one user's client knows."""

    number: int
    identifier: str
    passwords: list[str]
    """All that were ever asked for, the first one first."""
    second: str
    """Another identifier, which the account has now and then."""
    password: str = ""
    account_id: str = ""
    funded: bool = False
    token: str = ""
    session_id: str = ""
    device_proof: str = ""
    causal: str = ""
    edits: int = 0
    maybe_passwords: list[str] = field(default_factory=list)
    applications: list[str] = field(default_factory=list)
    asked_for_notifications: bool = False
    device_refused: bool = False
    """A password that may be right was called wrong: to the guard, the device has guessed."""
    second_refused: bool = False
    """Somewhere the second identifier was not known: whoever tries again and again must wait."""
    holds: list[tuple[str, int]] = field(default_factory=list)
    """Those that were made, perhaps long over: (id, amount)."""


class Workload:
    """The users of one mesh. `prefix` keeps them apart from all others that it has."""

    def __init__(
        self,
        stage: Stage,
        history: History,
        seed: str,
        users: int,
        prefix: str = "",
        think_s: float = 0.4,
    ) -> None:
        self.stage = stage
        self._history = history
        self.prefix = prefix
        self._think_s = think_s
        self.random = Random(f"workload {seed}")
        self._ids = stage.ids(self.random)
        self.users = [self.new_user(number) for number in range(users)]

    def new_user(self, number: int) -> User:
        """A user who has done nothing yet."""
        password = f"secret-{number}"
        names = (f"{self.prefix}{name}{number}@example.com" for name in ("user", "second"))
        return User(number, next(names), [password], next(names), password)

    async def run(self, user: User, until_s: float) -> None:
        """One user's doings, from registration until the time is up."""
        think_s = self._think_s * 1.6**user.number
        while not user.account_id:
            await self.register(user)
            await self.think(think_s)
        await self._contest(user)
        await self._deposit(user, 1000)
        actions = (
            *(self._transfer,) * 6,
            *(self._spend_twice,) * 1,
            *(self._reserve,) * 3,
            *(self._capture,) * 2,
            *(self._release,) * 1,
            *(self._apply,) * 3,
            *(self.login,) * 4,
            *(self.edit,) * 3,
            *(self._balance,) * 3,
            *(self._look,) * 1,
            *(self._change_password,) * 1,
            *(self.add_identifier,) * 1,
            *(self._remove_identifier,) * 1,
            *(self._login_with_second,) * 1,
            *(self._cancel,) * 1,
            *(self._leave,) * 1,
        )
        while self.stage.now_s() < until_s:
            if not user.token:
                await self.login(user)
            elif not user.asked_for_notifications:
                await self.ask_for_notifications(user)
            else:
                await self.random.choice(actions)(user)
            await self.think(think_s)

    async def think(self, mean_s: float) -> None:
        await asyncio.sleep(self.random.expovariate(1 / mean_s))

    def _gateway(self) -> str:
        return self.random.choice(self.stage.names)

    def begin(self, kind: str, user: User, **facts: Any) -> Operation:
        operation = Operation(kind, user.number, facts, self.stage.now_s())
        self._history.operations.append(operation)
        return operation

    async def _call(
        self,
        operation: Operation,
        user: User,
        path: str,
        request: Message,
        response_type: type[M],
        *,
        only_at: str | None = None,
    ) -> M | None:
        """Calls, and asks again elsewhere with the same id while it may have run."""
        may_have_run = False
        for attempt in range(ATTEMPTS_MAX):
            center = only_at or self._gateway()
            try:
                reply = await self._once(center, user, path, request)
            except RpcError as error:
                operation.reason = error.reason
                self.examine(operation, error)
                may_have_run = may_have_run or error.ran
                again = error.ran or error.code.name in ("UNAVAILABLE", "ABORTED")
                if error.reason in ("RELOGIN_REQUIRED", "SESSION_INVALID"):
                    user.token = ""
                    if await self.login(user):
                        continue
                # Half of them take "it did not run" at its word, and do not ask again.
                again = again and (error.ran or self.random.random() < 0.5)
                if again and not only_at and attempt < ATTEMPTS_MAX - 1:
                    await self.think(0.3)
                    continue
                operation.outcome = Outcome.UNKNOWN if may_have_run else Outcome.REFUSED
                break
            else:
                operation.outcome, operation.reason = Outcome.OK, ""
                operation.result = response_type.FromString(reply.payload)
                user.causal = reply.metadata.get(CAUSAL, user.causal)
                operation.facts["served_by"] = reply.metadata.get(SERVED_BY, "")
                break
        operation.end_s = self.stage.now_s()
        self.stage.note(str(operation))
        return operation.result if operation.outcome is Outcome.OK else None

    async def _once(self, center: str, user: User, path: str, request: Message) -> Any:
        metadata = {AUTHORIZATION: f"Bearer {user.token}"} if user.token else {}
        if user.causal:
            metadata[CAUSAL] = user.causal
        called = method(f"/duohuo.v1.{path}")
        return await self.stage.gateway(center).unary(
            Call(called, request.SerializeToString(), CALL_TIMEOUT_S, metadata)
        )

    async def insist(self, operation: Operation, act: Callable[[], Awaitable[None]]) -> None:
        """Does what an operator does, again until it is certain that it was done."""
        while operation.outcome is not Outcome.OK:
            try:
                await act()
                operation.outcome = Outcome.OK
            except RpcError as error:
                self.examine(operation, error)
                await self.think(INSIST_S)
        operation.end_s = self.stage.now_s()
        self.stage.note(str(operation))

    def examine(self, operation: Operation, error: RpcError) -> None:
        """CLEAR and PRIVATE, on every error."""
        if not error.reason or not error.message or error.reason == "INTERNAL":
            self._history.broken.append(f"CLEAR: {operation} was answered {error}")
        text = f"{error.message} {error.advice} {dict(error.details)}"
        if any(secret in text for secret in SECRETS):
            self._history.broken.append(f"PRIVATE: {operation} was answered {error}")

    async def register(self, user: User) -> None:
        operation = self.begin("register", user, identifier=user.identifier)
        request = RegisterRequest(
            identifier=user.identifier,
            password=user.password,
            display_name="0",
            request_id=f"register-{user.number}",
        )
        account = await self._call(operation, user, "AccountService/Register", request, Account)
        if account is not None:
            user.account_id = account.account_id

    async def _contest(self, user: User) -> None:
        """UNIQUE: all users want this identifier, each at some other gateway, some for the account that
        they have."""
        contested = f"{self.prefix}contested@example.com"
        if self.random.random() < 0.5:
            await self.login(user)
            if user.token:
                await self._set_identifier(user, contested, ATTACHED)
            return
        operation = self.begin("contest", user)
        request = RegisterRequest(
            identifier=contested,
            password=user.password,
            request_id=f"contest-{user.number}",
        )
        await self._call(operation, user, "AccountService/Register", request, Account)

    async def _deposit(self, user: User, amount: int) -> None:
        """An operator's deposit at the account's home, repeated until it is certain."""
        deposit_id = f"{self.prefix}deposit-{user.number}"
        operation = self.begin("deposit", user, id=deposit_id, amount=amount)

        async def deposit() -> None:
            home = self.stage.placement.home(slot_of(user.identifier))
            await self.stage.deposit(home, deposit_id, user.account_id, amount)

        await self.insist(operation, deposit)
        user.funded = True

    async def login(self, user: User) -> bool:
        """LOGIN: a living center that has the account and this password lets the user in."""
        name = self._gateway()
        mark = self.stage.undisturbed(name)
        must_work = mark is not None and self._has_copy(name, user)
        operation = self.begin("login", user, center=name, copied=must_work)
        request = LoginRequest(
            identifier=user.identifier,
            password=user.password,
            device="workload",
            device_proof=user.device_proof,
        )
        session = await self._call(
            operation, user, "SessionService/Login", request, Session, only_at=name
        )
        if session is not None:
            user.token, user.session_id = session.token, session.session_id
            user.device_proof = session.device_proof
            return True
        if must_work and self.stage.undisturbed(name) == mark:
            self._history.broken.append(f"LOGIN: {operation}")
        if operation.reason == "BAD_CREDENTIALS":
            user.device_refused = True
            user.maybe_passwords.append(user.password)
            user.password = user.maybe_passwords.pop(0)
        return False

    async def _login_with_second(self, user: User) -> None:
        """LOGIN: an identifier that was added is as good as the first one."""
        name = self._gateway()
        mark = self.stage.undisturbed(name)
        must_work = mark is not None and self._has_second(name, user) and not user.second_refused
        operation = self.begin("login with second", user, center=name, copied=must_work)
        request = LoginRequest(identifier=user.second, password=user.password, device="workload")
        session = await self._call(
            operation, user, "SessionService/Login", request, Session, only_at=name
        )
        if session is not None:
            if session.account_id != user.account_id:
                self._history.broken.append(f"UNIQUE: {operation} led to {session.account_id}")
            user.token, user.session_id = session.token, session.session_id
            user.second_refused = False
        elif must_work and self._has_second(name, user) and self.stage.undisturbed(name) == mark:
            self._history.broken.append(f"LOGIN: {operation}")
        user.second_refused |= operation.reason == "BAD_CREDENTIALS"

    def _has_second(self, center: str, user: User) -> bool:
        """Does a center know that the user has the second identifier, and this password?"""
        rows = self.stage.disk(center).rows(
            "account",
            "SELECT value FROM profile_field WHERE account_id = ? AND name = ?",
            user.account_id,
            identifier_field(user.second),
        )
        return rows == [(ATTACHED,)] and self._has_copy(center, user)

    async def add_identifier(self, user: User) -> None:
        await self._set_identifier(user, user.second, ATTACHED)

    async def _remove_identifier(self, user: User) -> None:
        await self._set_identifier(user, user.second, DETACHED)

    async def _set_identifier(self, user: User, identifier: str, state: str) -> None:
        operation = self.begin("identifier", user, identifier=identifier, state=state)
        request_id = self._ids.unique()
        if state == ATTACHED:
            adding = AddIdentifierRequest(
                account_id=user.account_id, identifier=identifier, request_id=request_id
            )
            await self._call(operation, user, "AccountService/AddIdentifier", adding, Account)
        else:
            removing = RemoveIdentifierRequest(
                account_id=user.account_id, identifier=identifier, request_id=request_id
            )
            await self._call(operation, user, "AccountService/RemoveIdentifier", removing, Account)

    def _has_copy(self, center: str, user: User) -> bool:
        rows = self.stage.disk(center).rows(
            "account",
            "SELECT password_hash FROM account JOIN credential USING (account_id)"
            " WHERE identifier = ?",
            user.identifier,
        )
        return bool(rows) and self.stage.fits(rows[0][0], user.password)

    async def _transfer(self, user: User) -> None:
        await self._send(user, self.random.choice((1, 10, 50, 200, 900)))

    async def _spend_twice(self, user: User) -> None:
        """NO-OVERDRAFT: everything there is, to two payees at once."""
        found = await self._balance(user)
        if found is not None and found.available.minor_units > 0:
            whole = found.available.minor_units
            await asyncio.gather(self._send(user, whole), self._send(user, whole))

    async def _send(self, user: User, amount: int) -> None:
        payee = self._payee(user)
        operation = self.begin(
            "transfer", user, id=self._ids.unique(), payee=payee.number, amount=amount
        )
        request = TransferRequest(
            transfer_id=operation.facts["id"],
            payer_account_id=user.account_id,
            amount=Money(currency_code=CURRENCY, minor_units=amount),
        )
        if payee.account_id and self.random.random() < 0.5:
            request.payee_account_id = payee.account_id
        else:
            request.payee_identifier = payee.identifier
        await self._call(operation, user, "TransferService/Transfer", request, TransferResult)

    async def _reserve(self, user: User) -> None:
        payee = self._payee(user)
        amount = self.random.choice((20, 150, 400))
        operation = self.begin(
            "reserve", user, id=self._ids.unique(), payee=payee.number, amount=amount
        )
        request = ReserveFundsRequest(
            hold_id=operation.facts["id"],
            payer_account_id=user.account_id,
            payee_identifier=payee.identifier,
            amount=Money(currency_code=CURRENCY, minor_units=amount),
        )
        lasts_ms = self.random.choice(HOLDS_LAST_MS)
        request.expire_time.CopyFrom(timestamp(self.stage.now_ms() + lasts_ms))
        hold = await self._call(operation, user, "TransferService/ReserveFunds", request, Hold)
        if hold is not None:
            user.holds.append((hold.hold_id, amount))

    async def _capture(self, user: User) -> None:
        """One of the last holds, all or a part of it, perhaps not for the first time, perhaps twice at
        once. Many are left to expire."""
        if not user.holds:
            return
        hold_id, amount = self.random.choice(user.holds[-3:])
        part = self.random.choice((None, 1, amount // 2, amount))
        once = self._capture_as(user, hold_id, part)
        if self.random.random() < 0.3:
            await asyncio.gather(once, self._capture_as(user, hold_id, part))
        else:
            await once

    async def _capture_as(self, user: User, hold_id: str, part: int | None) -> None:
        operation = self.begin("capture", user, hold=hold_id, id=self._ids.unique(), part=part)
        request = CaptureHoldRequest(
            payer_account_id=user.account_id, hold_id=hold_id, transfer_id=operation.facts["id"]
        )
        if part is not None:
            request.amount.CopyFrom(Money(currency_code=CURRENCY, minor_units=part))
        await self._call(
            operation, user, "TransferService/CaptureHold", request, CaptureHoldResponse
        )

    async def _release(self, user: User) -> None:
        if not user.holds:
            return
        hold_id, _ = self.random.choice(user.holds[-3:])
        operation = self.begin("release", user, hold=hold_id)
        request = ReleaseHoldRequest(payer_account_id=user.account_id, hold_id=hold_id)
        await self._call(operation, user, "TransferService/ReleaseHold", request, Hold)

    async def _apply(self, user: User) -> None:
        payee = self._payee(user)
        amount = self.random.choice((5, 100, 700))
        operation = self.begin(
            "apply", user, id=self._ids.unique(), payee=payee.number, amount=amount
        )
        request = ApplyTransferRequest(
            transfer_id=operation.facts["id"],
            payer_account_id=user.account_id,
            payee_identifier=payee.identifier,
            amount=Money(currency_code=CURRENCY, minor_units=amount),
        )
        found = await self._call(
            operation, user, "TransferService/ApplyTransfer", request, Application
        )
        if found is not None:
            user.applications.append(found.application_id)
        if self.random.random() < 0.3:
            # The same, or by mistake another amount, once more, perhaps at another center.
            again = self.begin("apply", user, id=request.transfer_id, payee=payee.number)
            request.amount.minor_units += self.random.choice((0, 0, 1))
            found = await self._call(
                again, user, "TransferService/ApplyTransfer", request, Application
            )
            if found is not None:
                user.applications.append(found.application_id)

    async def _cancel(self, user: User) -> None:
        if not user.applications:
            return
        wanted = user.applications[-1]
        operation = self.begin("cancel", user, application=wanted)
        request = CancelApplicationRequest(application_id=wanted)
        await self._call(operation, user, "TransferService/CancelApplication", request, Application)

    async def edit(self, user: User) -> None:
        user.edits += 1
        operation = self.begin("edit", user, value=str(user.edits))
        request = UpdateProfileRequest(
            account_id=user.account_id,
            profile=Profile(display_name=str(user.edits)),
            update_mask=FieldMask(paths=["display_name"]),
            request_id=f"edit-{user.number}-{user.edits:04d}",
        )
        await self._call(operation, user, "AccountService/UpdateProfile", request, Account)

    async def ask_for_notifications(self, user: User) -> None:
        operation = self.begin("notify", user)
        request = SetNotificationRequest(
            account_id=user.account_id,
            webhook_url=f"{WEBHOOK_URL}{user.number}",
            webhook_secret=SECRET,
            email=True,
            request_id=f"notify-{user.number}",
        )
        await self._call(operation, user, "AccountService/SetNotification", request, Notification)
        user.asked_for_notifications = bool(user.token)

    async def _change_password(self, user: User) -> None:
        new = f"secret-{user.number}-{self._ids.unique()[-6:]}"
        kept = user.token
        operation = self.begin(
            "change password", user, new=str(len(user.passwords)), kept=token_hash(kept).hex()
        )
        user.passwords.append(new)
        request = ChangePasswordRequest(
            account_id=user.account_id,
            old_password=user.password,
            new_password=new,
            request_id=self._ids.unique(),
        )
        await self._call(
            operation, user, "AccountService/ChangePassword", request, ChangePasswordResponse
        )
        if operation.outcome is Outcome.OK:
            user.password, user.maybe_passwords = new, []
        elif operation.outcome is Outcome.UNKNOWN:
            user.maybe_passwords.append(new)

    async def _balance(self, user: User) -> Balance | None:
        operation = self.begin("balance", user)
        request = GetBalanceRequest(account_id=user.account_id)
        return await self._call(operation, user, "TransferService/GetBalance", request, Balance)

    async def _look(self, user: User) -> None:
        """The reads that change nothing: they must only be clear when they fail."""
        account, payer = user.account_id, user.account_id
        for kind, request, answer in (
            ("AccountService/GetAccount", GetAccountRequest(account_id=account), Account),
            (
                "SessionService/ListSessions",
                ListSessionsRequest(account_id=account),
                ListSessionsResponse,
            ),
            (
                "TransferService/ListApplications",
                ListApplicationsRequest(payer_account_id=payer),
                ListApplicationsResponse,
            ),
            (
                "TransferService/ListEntries",
                ListEntriesRequest(account_id=account),
                ListEntriesResponse,
            ),
        ):
            await self._call(self.begin("look", user), user, kind, request, answer)

    async def _leave(self, user: User) -> None:
        """Logs out, or ends all sessions."""
        token = user.token
        way = self.random.randrange(3)
        if way == 0 and user.session_id:
            # As good as a logout, where its center can be reached.
            operation = self.begin("logout", user, token=token)
            one = RevokeSessionRequest(account_id=user.account_id, session_id=user.session_id)
            await self._call(
                operation, user, "SessionService/RevokeSession", one, RevokeSessionResponse
            )
        elif way == 1:
            operation = self.begin("logout", user, token=token)
            await self._call(
                operation, user, "SessionService/Logout", LogoutRequest(token=token), LogoutResponse
            )
        else:
            operation = self.begin("revoke", user)
            request = RevokeSessionsRequest(account_id=user.account_id)
            await self._call(
                operation, user, "SessionService/RevokeSessions", request, RevokeSessionsResponse
            )
        user.token = ""

    def _payee(self, user: User) -> User:
        return self.random.choice([other for other in self.users if other is not user])
