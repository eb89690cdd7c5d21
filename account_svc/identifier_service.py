"""More identifiers for an account: claimed at their own home, then used by the account."""

from grpc import StatusCode

from account_svc import registry, rules, store
from account_svc.registry import AccountRow
from account_svc.service import AccountService
from duohuo.internal.v1.peer_services_pb2 import ClaimIdentifierRequest, ClaimIdentifierResponse
from duohuo.v1.account_service_pb2 import Account, AddIdentifierRequest, RemoveIdentifierRequest
from runtime.dispatcher import Incoming
from runtime.errors import RpcError
from runtime.guesses import Guesses, Policy
from runtime.home_calls import ask_home
from runtime.methods import peer_method
from runtime.placement import slot_of
from runtime.store import Store
from sync_bus.homes import Homes
from sync_bus.log import Stamp
from sync_bus.site import Site

PEER_TIMEOUT_S = 2.0
_TAKEN_IDENTIFIERS = Policy(5, 30_000, 900_000)
_CLAIM = peer_method("account", "ClaimIdentifier")


class IdentifierService:
    """Serves the identifiers' part of AccountService and AccountPeerService."""

    def __init__(self, site: Site, database: Store, accounts: AccountService, slots: Homes) -> None:
        self._homes = slots
        self._site = site
        self._store = database
        self._accounts = accounts
        self._guesses = Guesses(site.here, site.clock)

    async def AddIdentifier(self, request: AddIdentifierRequest, incoming: Incoming) -> Account:
        account, identifier = await self._checked(request)
        # The time at which it was asked for: a removal that is asked for meanwhile comes after it.
        stamp = self._site.stamps.now()
        if identifier != account.identifier:
            claimed = await self._store.read(registry.claims(account.account_id))
            if identifier not in claimed and len(claimed) >= rules.IDENTIFIERS_MAX - 1:
                raise RpcError(
                    StatusCode.FAILED_PRECONDITION,
                    "TOO_MANY_IDENTIFIERS",
                    f"{rules.IDENTIFIERS_MAX} identifiers belong to this account already, for ever",
                )
            # Claimed, but not yet used by the account if this center dies now: then it is the account's
            # all the same, and whoever asks again finds it so.
            await self._claim(identifier, account.account_id, incoming.timeout_s)
            await self._attach(account, identifier, registry.ATTACHED, request.request_id, stamp)
        return await self._accounts.answer(account, incoming)

    async def RemoveIdentifier(
        self, request: RemoveIdentifierRequest, incoming: Incoming
    ) -> Account:
        account, identifier = await self._checked(request)
        if identifier == account.identifier:
            raise RpcError(
                StatusCode.FAILED_PRECONDITION,
                "FIRST_IDENTIFIER",
                "the identifier that an account was registered with stays",
            )
        known = dict(await self._store.read(store.profile_fields(account.account_id)))
        if registry.identifier_field(identifier) not in known:
            raise RpcError(
                StatusCode.NOT_FOUND,
                "IDENTIFIER_UNKNOWN",
                "this account has no such identifier, as far as is known here",
                advice="If it was added just now, try again in a moment.",
            )
        stamp = self._site.stamps.now()
        await self._attach(account, identifier, registry.DETACHED, request.request_id, stamp)
        return await self._accounts.answer(account, incoming)

    async def _checked(
        self, request: AddIdentifierRequest | RemoveIdentifierRequest
    ) -> tuple[AccountRow, str]:
        rules.check_request_id(request.request_id)
        identifier = rules.check_identifier(request.identifier)
        self._site.require_believable_clock()
        return await self._accounts.known(request.account_id), identifier

    async def _claim(self, identifier: str, account: str, timeout_s: float) -> None:
        """Has the identifier's home claim it. Raises RpcError IDENTIFIER_TAKEN, or what home raises."""
        attempt = self._guesses.begin("claim", account, _TAKEN_IDENTIFIERS)
        if attempt.wait_ms:
            raise RpcError(
                StatusCode.RESOURCE_EXHAUSTED,
                "TOO_MANY_ATTEMPTS",
                "too many identifiers that others have were asked for",
                retry_after_ms=attempt.wait_ms,
            )
        slot = slot_of(identifier)
        home = self._site.placement.home(slot)
        asked = ClaimIdentifierRequest(identifier=identifier, account_id=account)
        taken = False
        try:
            found = await ask_home(
                self._site.mesh,
                self._site.placement,
                slot,
                _CLAIM,
                asked,
                ClaimIdentifierResponse,
                min(timeout_s, PEER_TIMEOUT_S),
            )
            taken = found.holder_account_id != account
        except RpcError as error:
            if home == self._site.here or error.code is not StatusCode.UNAVAILABLE:
                raise
            raise RpcError(
                StatusCode.UNAVAILABLE,
                "IDENTIFIER_HOME_UNAVAILABLE",
                f"only center {home}, which does not answer now, can give this identifier to anybody",
                ran=error.ran,
                retry_after_ms=error.retry_after_ms or 5000,
                advice="Try again later; what the account has already goes on working.",
            ) from error
        finally:
            self._guesses.end(attempt, failed=taken)
        if taken:
            raise rules.identifier_taken()

    async def _attach(
        self, account: AccountRow, identifier: str, state: str, request_id: str, stamp: Stamp
    ) -> None:
        fields = {registry.identifier_field(identifier): state}
        unit = store.set_profile(account.account_id, fields, request_id, self._site.here, stamp)
        if not await self._store.write("attach identifier", unit):
            raise rules.idempotency_conflict()

    async def ClaimIdentifier(
        self, request: ClaimIdentifierRequest, _incoming: Incoming
    ) -> ClaimIdentifierResponse:
        identifier = rules.check_identifier(request.identifier)
        self._site.slot_of(request.account_id)
        claim = registry.claim(
            identifier, request.account_id, self._site.here, self._site.stamps.now()
        )
        unit = self._homes.acting(slot_of(identifier), claim)
        return ClaimIdentifierResponse(holder_account_id=await self._store.write("claim", unit))
