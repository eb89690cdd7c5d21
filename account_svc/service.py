"""The account service's RPCs: check, load, decide, commit, answer."""

from collections.abc import Callable

from grpc import StatusCode

from account_svc import rules, store
from account_svc.passwords import Passwords
from account_svc.store import AccountRow
from duohuo.internal.v1.peer_services_pb2 import (
    PASSWORD_OUTCOME_MISMATCH,
    PASSWORD_OUTCOME_UNKNOWN,
    PASSWORD_OUTCOME_VERIFIED,
    LookupAccountRequest,
    LookupAccountResponse,
    VerifyPasswordRequest,
    VerifyPasswordResponse,
)
from duohuo.v1.account_service_pb2 import (
    Account,
    ChangePasswordRequest,
    ChangePasswordResponse,
    GetAccountRequest,
    RegisterRequest,
    UpdateProfileRequest,
)
from duohuo.v1.operator_service_pb2 import (
    FieldVersion,
    ListVersionsRequest,
    ListVersionsResponse,
)
from runtime.clock import timestamp
from runtime.dispatcher import Incoming
from runtime.endpoint import HOME, STALENESS_MS
from runtime.errors import RpcError
from runtime.hlc import physical_ms
from runtime.ids import account_id, account_slot
from runtime.placement import slot_of
from runtime.store import Store
from sync_bus.site import Site


class AccountService:
    """Serves AccountService, and the account part of AccountPeerService.

    `current_ms(source)` tells when the copy of another center's accounts was last complete.
    """

    def __init__(
        self, site: Site, database: Store, passwords: Passwords, current_ms: Callable[[str], int]
    ) -> None:
        self._site = site
        self._store = database
        self._passwords = passwords
        self._current_ms = current_ms

    async def Register(self, request: RegisterRequest, incoming: Incoming) -> Account:
        identifier = rules.check_register(request)
        slot = slot_of(identifier)
        self._site.require_home(slot)
        present = await self._store.read(store.find_by_identifier(identifier))
        fields = {"display_name": request.display_name}
        if present is None:
            password_hash = await self._passwords.hash(request.password)
            stamp = self._site.stamps.now()
            wanted = AccountRow(
                account_id(slot, self._site.ids.unique()),
                identifier,
                request.request_id,
                self._site.here,
                stamp.time_ms,
            )
            present = await self._store.write(
                "register", store.register(wanted, password_hash, fields, stamp)
            )
            if present == wanted:
                return await self._answer(present, incoming)
        if present.request_id != request.request_id:
            raise RpcError(
                StatusCode.ALREADY_EXISTS, "IDENTIFIER_TAKEN", "this identifier has an account"
            )
        profile = store.seen(present.account_id, store.profile_part(request.request_id))
        if await self._store.read(profile) not in (None, store.body_of_fields(fields)):
            raise rules.idempotency_conflict()
        await self._require_same_password(present.account_id, request.request_id, request.password)
        return await self._answer(present, incoming)

    async def GetAccount(self, request: GetAccountRequest, incoming: Incoming) -> Account:
        return await self._answer(await self._known(request.account_id), incoming)

    async def UpdateProfile(self, request: UpdateProfileRequest, incoming: Incoming) -> Account:
        fields = rules.changed_fields(request)
        self._site.require_believable_clock()
        account = await self._known(request.account_id)
        same = await self._store.write(
            "set profile",
            store.set_profile(
                account.account_id,
                fields,
                request.request_id,
                self._site.here,
                self._site.stamps.now(),
            ),
        )
        if not same:
            raise rules.idempotency_conflict()
        return await self._answer(account, incoming)

    async def ChangePassword(
        self, request: ChangePasswordRequest, _incoming: Incoming
    ) -> ChangePasswordResponse:
        rules.check_request_id(request.request_id)
        rules.check_password("new_password", request.new_password)
        self._site.require_believable_clock()
        account = await self._known(request.account_id)
        if await self._require_same_password(
            account.account_id, request.request_id, request.new_password
        ):
            return ChangePasswordResponse()
        credential = await self._store.read(store.find_credential(account.account_id))
        proved = await self._passwords.verify(
            credential.password_hash if credential else None, request.old_password
        )
        if credential is None or not proved:
            home = self._site.home_of(account.account_id)
            if home != self._site.here:
                raise RpcError(
                    StatusCode.UNAVAILABLE,
                    "HOME_CENTER_UNAVAILABLE",
                    f"only center {home}, which does not answer now, can check this password",
                    retry_after_ms=5000,
                    advice="Try again in a moment; your password may still be right.",
                )
            raise RpcError(
                StatusCode.UNAUTHENTICATED, "BAD_CREDENTIALS", "the old password is wrong"
            )
        done = await self._store.write(
            "set password",
            store.set_password(
                account.account_id,
                await self._passwords.hash(request.new_password),
                request.request_id,
                self._site.here,
                self._site.stamps.now(),
                replaces=credential.version,
            ),
        )
        if not done:
            raise RpcError(
                StatusCode.ABORTED,
                "PASSWORD_CHANGED_MEANWHILE",
                "the password was changed by somebody else at the same time",
            )
        return ChangePasswordResponse()

    async def VerifyPassword(
        self, request: VerifyPasswordRequest, _incoming: Incoming
    ) -> VerifyPasswordResponse:
        identifier = rules.check_identifier(request.identifier)
        account = await self._store.read(store.find_by_identifier(identifier))
        credential = (
            await self._store.read(store.find_credential(account.account_id)) if account else None
        )
        fits = await self._passwords.verify(
            credential.password_hash if credential else None, request.password
        )
        if credential is None:
            return VerifyPasswordResponse(outcome=PASSWORD_OUTCOME_UNKNOWN)
        if not fits:
            return VerifyPasswordResponse(outcome=PASSWORD_OUTCOME_MISMATCH)
        return VerifyPasswordResponse(
            outcome=PASSWORD_OUTCOME_VERIFIED, account_id=credential.account_id
        )

    async def LookupAccount(
        self, request: LookupAccountRequest, _incoming: Incoming
    ) -> LookupAccountResponse:
        account = await self._find(request.user)
        return LookupAccountResponse(account_id=account.account_id if account else "")

    async def ListVersions(
        self, request: ListVersionsRequest, _incoming: Incoming
    ) -> ListVersionsResponse:
        account = await self._find(request.user)
        # A profile or password may have arrived before its account.
        wanted = account.account_id if account else request.user
        found = await self._store.read(store.versions(wanted))
        return ListVersionsResponse(
            account_id=wanted if found else "",
            versions=[
                FieldVersion(
                    field=one.name,
                    value="" if one.name == store.PASSWORD else one.value,
                    center=one.version.center,
                    hlc=one.version.hlc,
                    time=timestamp(physical_ms(one.version.hlc)),
                    present=one.present,
                )
                for one in found
            ],
        )

    async def _require_same_password(self, account: str, request_id: str, password: str) -> bool:
        """False if there was no such request. Raises IDEMPOTENCY_CONFLICT if it set another password;
        that is known for as long as its password has not been replaced."""
        body = await self._store.read(store.seen(account, request_id))
        credential = await self._store.read(store.find_credential(account))
        if (
            credential is not None
            and store.body_of_password(credential.version) == body
            and not await self._passwords.verify(credential.password_hash, password)
        ):
            raise rules.idempotency_conflict()
        return body is not None

    async def _find(self, user: str) -> AccountRow | None:
        """The account meant by an account id or an identifier. Raises RpcError if it is neither."""
        if account_slot(user) is not None:
            return await self._store.read(store.find_account(user))
        identifier = rules.check_identifier(user)
        return await self._store.read(store.find_by_identifier(identifier))

    async def _known(self, wanted: str) -> AccountRow:
        account = await self._store.read(store.find_account(wanted))
        if account is None:
            raise self._site.unknown_here(wanted)
        return account

    async def _answer(self, account: AccountRow, incoming: Incoming) -> Account:
        home = self._site.home_of(account.account_id)
        incoming.reply_metadata[HOME] = home
        if home != self._site.here:
            age_ms = self._site.clock.wall_ms() - self._current_ms(home)
            incoming.reply_metadata[STALENESS_MS] = str(age_ms)
        return Account(
            account_id=account.account_id,
            identifiers=[account.identifier],
            profile=rules.profile_of(
                await self._store.read(store.profile_fields(account.account_id))
            ),
            home_center=home,
            create_time=timestamp(account.create_ms),
        )
