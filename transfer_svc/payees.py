"""Finds out whom a transfer pays."""

from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import LookupAccountRequest, LookupAccountResponse
from duohuo.v1.transfer_service_pb2 import TransferRequest
from runtime.endpoint import ask
from runtime.errors import RpcError
from runtime.ids import place_of
from runtime.methods import peer_method
from runtime.store import Store
from sync_bus.site import Site
from transfer_svc import ledger
from transfer_svc.rules import PAYEE_HOME_UNAVAILABLE

PEER_TIMEOUT_S = 2.0
_LOOKUP = peer_method("account", "LookupAccount")


class Payees:
    """Looks payees up here, and at their home center if they are not known here."""

    def __init__(self, site: Site, database: Store) -> None:
        self._site = site
        self._store = database

    async def resolve(self, request: TransferRequest) -> tuple[str, str]:
        """The payee's account id, or empty with the reason for a refusal.

        Raises RpcError, definitely not run, when only a center that does not answer could tell.
        """
        user = request.payee_account_id or request.payee_identifier
        if request.payee_account_id:
            account = await self._store.read(ledger.find(user))
            if account is not None:
                return user, ""
        place = place_of(user)
        assert place is not None  # noqa: S101 - the request has been checked
        assert place.slot is not None  # noqa: S101 - as above
        home = self._site.placement.home(place.slot)
        answer = await self._lookup(self._site.here, user)
        if not answer.account_id and not answer.certain:
            try:
                answer = await self._lookup(home, user)
            except RpcError as error:
                raise _unavailable(home) from error
        found = answer.account_id
        if not found and not answer.certain:
            raise _unavailable(home)
        if not found:
            return "", "PAYEE_NOT_FOUND"
        return (found, "") if found != request.payer_account_id else ("", "SELF_TRANSFER")

    async def _lookup(self, center: str, user: str) -> LookupAccountResponse:
        return await ask(
            self._site.mesh.at(center),
            _LOOKUP,
            LookupAccountRequest(user=user),
            LookupAccountResponse,
            PEER_TIMEOUT_S,
        )


def _unavailable(home: str) -> RpcError:
    return RpcError(
        StatusCode.UNAVAILABLE,
        PAYEE_HOME_UNAVAILABLE,
        f"only center {home}, which does not answer now, knows whether the payee exists",
        retry_after_ms=5000,
        advice="Use ApplyTransfer with the same transfer_id: it is queued and decided "
        "when the payee's home center is back.",
    )
