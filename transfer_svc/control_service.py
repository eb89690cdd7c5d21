"""What operators ask of an account's home: to freeze, close or limit it. Part of the peer interface."""

from duohuo.internal.v1.peer_services_pb2 import ChangeControlRequest, GetControlRequest
from duohuo.v1.operator_service_pb2 import (
    ACCOUNT_STATUS_UNSPECIFIED,
    AccountControl,
    AccountControlChange,
    CountSlotsRequest,
    CountSlotsResponse,
)
from runtime.dispatcher import Incoming
from runtime.errors import invalid
from runtime.store import Store, Unit
from sync_bus.homes import Homes
from sync_bus.site import Site
from transfer_svc import controls, moving, rules
from transfer_svc.controls import Change


class ControlService:
    """Serves ChangeControl and GetControl, as the home of the account alone; and CountSlots."""

    def __init__(self, site: Site, database: Store, slots: Homes) -> None:
        self._homes = slots
        self._site = site
        self._store = database

    async def ChangeControl(
        self, request: ChangeControlRequest, incoming: Incoming
    ) -> AccountControlChange:
        unit = self._homes.acting(
            self._site.slot_of(request.account_id), self._change(request, incoming.operator)
        )
        change = await self._store.write("change control", unit)
        if change.refused:
            raise rules.refusal(change.refused)
        paid = await self._paid_today(request.account_id)
        here = self._site.here
        return AccountControlChange(
            before=change.before.message(here, paid), after=change.after.message(here, paid)
        )

    async def GetControl(self, request: GetControlRequest, _incoming: Incoming) -> AccountControl:
        slot = self._site.slot_of(request.account_id)
        found = controls.find(request.account_id)
        control = await self._store.read(self._homes.acting(slot, found))
        return control.message(self._site.here, await self._paid_today(request.account_id))

    async def CountSlots(
        self, request: CountSlotsRequest, _incoming: Incoming
    ) -> CountSlotsResponse:
        return await self._store.read(moving.count_in(request.slots))

    def _change(self, request: ChangeControlRequest, who: str) -> Unit[Change]:
        here, stamp = self._site.here, self._site.stamps.now()
        account = request.account_id
        version = request.version if request.HasField("version") else None
        if request.WhichOneof("change") == "limits":
            limits = request.limits
            rules.check_limit("per_transfer_minor_units_max", limits.per_transfer_minor_units_max)
            rules.check_limit("per_day_minor_units_max", limits.per_day_minor_units_max)
            return controls.set_limits(here, account, limits, version, who, stamp)
        if request.status == ACCOUNT_STATUS_UNSPECIFIED:
            raise invalid("change", "must say what to change")
        return controls.set_status(here, account, request.status, version, who, stamp)

    async def _paid_today(self, account_id: str) -> int:
        now_ms = self._site.clock.wall_ms()
        return await self._store.read(controls.paid_on_day(account_id, now_ms))
