"""The account service's RPCs: check, load, decide, commit, answer."""

from collections.abc import Callable
from contextlib import suppress

from grpc import StatusCode

from account_svc import notification, password_rules, registry, rules, store
from account_svc.notification import Setting
from account_svc.passwords import Passwords
from account_svc.registry import AccountRow
from account_svc.revoker import Revoker
from account_svc.store import Credential
from duohuo.internal.v1.peer_services_pb2 import (
    PASSWORD_OUTCOME_MISMATCH,
    PASSWORD_OUTCOME_UNKNOWN,
    PASSWORD_OUTCOME_VERIFIED,
    EraseAtHomeRequest,
    LookupAccountRequest,
    LookupAccountResponse,
    LookupContactRequest,
    LookupContactResponse,
    VerifyPasswordRequest,
    VerifyPasswordResponse,
)
from duohuo.v1.account_service_pb2 import (
    Account,
    AccountExport,
    ChangePasswordRequest,
    ChangePasswordResponse,
    ExportAccountRequest,
    GetAccountRequest,
    GetNotificationRequest,
    KeptValue,
    Notification,
    RegisterRequest,
    SetNotificationRequest,
    UpdateProfileRequest,
)
from duohuo.v1.operator_service_pb2 import (
    CountSlotsRequest,
    CountSlotsResponse,
    EraseAccountResponse,
    FieldVersion,
    ListVersionsRequest,
    ListVersionsResponse,
)
from runtime.clock import timestamp
from runtime.destinations import Destinations
from runtime.dispatcher import Incoming
from runtime.endpoint import HOME, STALENESS_MS
from runtime.errors import RpcError
from runtime.guesses import Guesses, Policy
from runtime.hlc import physical_ms
from runtime.ids import account_id, account_slot, place_of
from runtime.placement import slot_of
from runtime.store import Store, Unit
from sync_bus import homes
from sync_bus.followers import Followers
from sync_bus.homes import Homes
from sync_bus.site import Site

ERASED_WITHIN_S = 3.0
"""So long an operator waits to hear that the other centers have erased it too."""
_OLD_PASSWORDS = Policy(5, 30_000, 900_000)


class AccountService:
    """Serves AccountService, and the account part of AccountPeerService.

    `current_ms(source)` tells when the copy of another center's accounts was last complete.
    """

    def __init__(
        self,
        site: Site,
        database: Store,
        passwords: Passwords,
        current_ms: Callable[[str], int],
        destinations: Destinations,
        revoker: Revoker,
        followers: Followers,
        slots: Homes,
        *,
        email_offered: bool,
    ) -> None:
        self._guesses = Guesses(site.here, site.clock)
        self._homes = slots
        self._site = site
        self._store = database
        self._passwords = passwords
        self._current_ms = current_ms
        self._destinations = destinations
        self._revoker = revoker
        self._followers = followers
        self._email_offered = email_offered

    async def Register(self, request: RegisterRequest, incoming: Incoming) -> Account:
        identifier = rules.check_register(request)
        slot = slot_of(identifier)
        known = registry.find_registered(identifier)
        present = await self._store.read(self._homes.acting(slot, known))
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
            unit = self._homes.acting(slot, store.register(wanted, password_hash, fields, stamp))
            if await self._store.write("register", unit):
                return await self.answer(wanted, incoming)
            present = await self._store.read(registry.find_registered(identifier))
        if present is None or present.request_id != request.request_id:
            raise rules.identifier_taken()
        profile = store.seen(present.account_id, store.profile_part(request.request_id))
        if await self._store.read(profile) not in (None, store.body_of_fields(fields)):
            raise rules.idempotency_conflict()
        await self._require_same_password(present.account_id, request.request_id, request.password)
        return await self.answer(present, incoming)

    async def GetAccount(self, request: GetAccountRequest, incoming: Incoming) -> Account:
        return await self.answer(await self.known(request.account_id), incoming)

    async def ExportAccount(
        self, request: ExportAccountRequest, incoming: Incoming
    ) -> AccountExport:
        account = await self.known(request.account_id)
        setting = await self._setting(account)
        return AccountExport(
            account=await self.answer(account, incoming),
            notification=setting.shown(account.account_id),
            values=[
                KeptValue(
                    field=one.name,
                    value="" if one.name == store.PASSWORD else one.value,
                    time=timestamp(physical_ms(one.version.hlc)),
                    present=one.present,
                )
                for one in await self._store.read(store.versions(account.account_id))
            ],
        )

    async def EraseAtHome(
        self, request: EraseAtHomeRequest, incoming: Incoming
    ) -> EraseAccountResponse:
        account_id = request.account_id
        slot = self._site.slot_of(account_id)
        known = registry.find_account(account_id)
        if await self._store.read(self._homes.acting(slot, known)) is None:
            raise RpcError(StatusCode.NOT_FOUND, "ACCOUNT_NOT_FOUND", "there is no such account")
        unit = store.erase(account_id, self._site.here, incoming.operator, self._site.stamps.now())
        await self._store.write("erase", self._homes.acting(slot, unit))
        await self._revoker.revoke_now(account_id)
        waiting_for = await self._followers.wait(registry.ACCOUNTS.name, ERASED_WITHIN_S)
        return EraseAccountResponse(account_id=account_id, waiting_for=waiting_for)

    async def UpdateProfile(self, request: UpdateProfileRequest, incoming: Incoming) -> Account:
        fields = rules.changed_fields(request)
        self._site.require_believable_clock()
        account = await self.known(request.account_id)
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
        return await self.answer(account, incoming)

    async def ChangePassword(
        self, request: ChangePasswordRequest, incoming: Incoming
    ) -> ChangePasswordResponse:
        rules.check_request_id(request.request_id)
        self._site.require_believable_clock()
        account = await self.known(request.account_id)
        for identifier in await self._identifiers(account):
            password_rules.check("new_password", request.new_password, identifier)
        if await self._require_same_password(
            account.account_id, request.request_id, request.new_password
        ):
            return ChangePasswordResponse()
        credential = await self._store.read(store.find_credential(account.account_id))
        proved = await self._proves(credential, request)
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
                kept_session_id=incoming.session_id,
            ),
        )
        if not done:
            raise RpcError(
                StatusCode.ABORTED,
                "PASSWORD_CHANGED_MEANWHILE",
                "the password was changed by somebody else at the same time",
            )
        await self._revoker.revoke_now(account.account_id)
        return ChangePasswordResponse()

    async def _proves(self, credential: Credential | None, request: ChangePasswordRequest) -> bool:
        """Does the old password fit? After too many that do not, none does for a while."""
        attempt = self._guesses.begin("account", request.account_id, _OLD_PASSWORDS)
        password = self._site.ids.secret() if attempt.wait_ms else request.old_password
        failed = False
        try:
            proved = await self._passwords.verify(
                credential.password_hash if credential else None, password
            )
            failed = not proved
        finally:
            if not attempt.wait_ms:
                self._guesses.end(attempt, failed=failed)
        return proved

    async def GetNotification(
        self, request: GetNotificationRequest, incoming: Incoming
    ) -> Notification:
        account = await self.known(request.account_id)
        self._tell_age(account, incoming)
        return (await self._setting(account)).shown(account.account_id)

    async def SetNotification(
        self, request: SetNotificationRequest, incoming: Incoming
    ) -> Notification:
        rules.check_request_id(request.request_id)
        self._site.require_believable_clock()
        account = await self.known(request.account_id)
        setting = await notification.checked(
            request,
            account.identifier,
            await self._setting(account),
            self._destinations,
            email_offered=self._email_offered,
        )
        same = await self._store.write(
            "set notification",
            store.set_notification(
                account.account_id,
                setting,
                request.request_id,
                self._site.here,
                self._site.stamps.now(),
            ),
        )
        if not same:
            raise rules.idempotency_conflict()
        self._tell_age(account, incoming)
        return (await self._setting(account)).shown(account.account_id)

    async def LookupContact(
        self, request: LookupContactRequest, _incoming: Incoming
    ) -> LookupContactResponse:
        account = await self._store.read(registry.find_account(request.account_id))
        setting = await self._store.read(notification.find(request.account_id))
        if account is None or setting is None:
            return LookupContactResponse()
        return LookupContactResponse(
            known=True,
            webhook_url=setting.webhook_url,
            webhook_secret=setting.webhook_secret,
            email_address=account.identifier if setting.email else "",
        )

    async def VerifyPassword(
        self, request: VerifyPasswordRequest, _incoming: Incoming
    ) -> VerifyPasswordResponse:
        # Looked for in any case: an unknown user must not be answered sooner.
        identifier = rules.check_identifier(request.identifier)
        account = await self._store.read(registry.find_by_identifier(identifier))
        account_id = request.account_id or (account.account_id if account else "")
        credential = await self._store.read(store.find_credential(account_id))
        fits = await self._passwords.verify(
            credential.password_hash if credential else None, request.password
        )
        if credential is None:
            return VerifyPasswordResponse(outcome=PASSWORD_OUTCOME_UNKNOWN)
        if not fits:
            return VerifyPasswordResponse(
                outcome=PASSWORD_OUTCOME_MISMATCH, account_id=credential.account_id
            )
        await self._renew(credential, request.password)
        return VerifyPasswordResponse(
            outcome=PASSWORD_OUTCOME_VERIFIED,
            account_id=credential.account_id,
            set_time_ms=physical_ms(credential.version.hlc),
        )

    async def _renew(self, credential: Credential, password: str) -> None:
        """Hashes a password anew, at its account's home, if other parameters are in use now."""
        if self._site.home_of(credential.account_id) != self._site.here:
            return
        if not self._passwords.is_outdated(credential.password_hash):
            return
        with suppress(RpcError):  # too busy, or a full disk: the next login will do
            unit = store.renew_hash(
                credential.account_id,
                await self._passwords.hash(password),
                credential.version,
                self._site.here,
                self._site.stamps.now(),
            )
            await self._store.write("renew hash", unit)

    async def LookupAccount(
        self, request: LookupAccountRequest, _incoming: Incoming
    ) -> LookupAccountResponse:
        account = await self._find(request.user)
        if account is not None:
            return LookupAccountResponse(account_id=account.account_id)
        place = place_of(request.user)
        slot = place.slot if place else None
        if slot is None:
            return LookupAccountResponse()
        certain = await self._store.read(homes.acts_for(self._site.here, slot))
        return LookupAccountResponse(certain=certain)

    async def CountSlots(
        self, request: CountSlotsRequest, _incoming: Incoming
    ) -> CountSlotsResponse:
        return CountSlotsResponse(accounts=await self._store.read(registry.count_in(request.slots)))

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
            return await self._store.read(registry.find_account(user))
        identifier = rules.check_identifier(user)
        return await self._store.read(registry.find_by_identifier(identifier))

    async def known(self, wanted: str) -> AccountRow:
        """An account. Raises RpcError if there is none here, or not any more."""
        return await self._store.read(self._present(wanted))

    def _present(self, wanted: str) -> Unit[AccountRow]:
        yield from registry.require_present(wanted)
        account = yield from registry.find_account(wanted)
        if account is None:
            raise self._site.unknown_here(wanted)
        return account

    async def _setting(self, account: AccountRow) -> Setting:
        return await self._store.read(notification.find(account.account_id)) or Setting()

    def _tell_age(self, account: AccountRow, incoming: Incoming) -> str:
        """Notes in the reply where the account's home is, and how old what is known here is."""
        home = self._site.home_of(account.account_id)
        incoming.reply_metadata[HOME] = home
        if home != self._site.here:
            age_ms = self._site.clock.wall_ms() - self._current_ms(home)
            incoming.reply_metadata[STALENESS_MS] = str(age_ms)
        return home

    async def _identifiers(self, account: AccountRow) -> list[str]:
        return [account.identifier, *await self._store.read(registry.attached(account.account_id))]

    async def answer(self, account: AccountRow, incoming: Incoming) -> Account:
        """An account as its user sees it."""
        home = self._tell_age(account, incoming)
        return Account(
            account_id=account.account_id,
            identifiers=await self._identifiers(account),
            profile=rules.profile_of(
                await self._store.read(store.profile_fields(account.account_id))
            ),
            home_center=home,
            create_time=timestamp(account.create_ms),
        )
