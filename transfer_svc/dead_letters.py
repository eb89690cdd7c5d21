"""What operators see and do about notifications that were not delivered."""

from collections.abc import Sequence

from grpc import StatusCode

from duohuo.v1.operator_service_pb2 import (
    Channel,
    Delivery,
    DeliveryState,
    DropNotificationRequest,
    DropNotificationResponse,
    ListNotificationsRequest,
    ListNotificationsResponse,
    RetryNotificationsRequest,
    RetryNotificationsResponse,
)
from runtime.dispatcher import Incoming
from runtime.errors import RpcError, invalid
from runtime.store import Store, Unit
from sync_bus import audit
from sync_bus.audit import Action
from sync_bus.log import Stamp
from sync_bus.site import Site
from transfer_svc import notifications

RETRY, DROP = "notification retry", "notification drop"


class DeadLetters:
    """Serves the notifications' part of TransferPeerService."""

    def __init__(self, site: Site, database: Store) -> None:
        self._site = site
        self._store = database

    async def ListNotifications(
        self, _request: ListNotificationsRequest, _incoming: Incoming
    ) -> ListNotificationsResponse:
        found = await self._store.read(notifications.undelivered())
        return ListNotificationsResponse(deliveries=found)

    async def RetryNotifications(
        self, request: RetryNotificationsRequest, incoming: Incoming
    ) -> RetryNotificationsResponse:
        noted, stamp = request.notification_id, self._site.stamps.now()
        unit = notifications.retry(noted, stamp.time_ms)
        done, actions = await self._store.write(
            "retry notifications", self._audited(unit, incoming.operator, RETRY, stamp)
        )
        if noted and not done:
            raise _nothing_open("it is no dead letter of this center")
        self._tell(actions)
        return RetryNotificationsResponse(deliveries=done)

    async def DropNotification(
        self, request: DropNotificationRequest, incoming: Incoming
    ) -> DropNotificationResponse:
        if not request.notification_id:
            raise invalid("notification_id", "must name one notification")
        stamp = self._site.stamps.now()
        unit = notifications.drop(request.notification_id, stamp.time_ms)
        done, actions = await self._store.write(
            "drop notification", self._audited(unit, incoming.operator, DROP, stamp)
        )
        if not done:
            raise _nothing_open("this center has nothing undelivered of it")
        self._tell(actions)
        return DropNotificationResponse(deliveries=done)

    def _audited(
        self, unit: Unit[list[Delivery]], who: str, action: str, stamp: Stamp
    ) -> Unit[tuple[list[Delivery], list[Action]]]:
        """Does it, and notes who did: one row of the audit log for each delivery."""
        done = yield from unit
        actions = []
        for one in done:
            channel = Channel.Name(one.channel).removeprefix("CHANNEL_").lower()
            after = DeliveryState.Name(one.state).removeprefix("DELIVERY_STATE_")
            actions.append(
                (
                    yield from audit.record(
                        "transfer",
                        self._site.here,
                        who,
                        action,
                        one.notification_id,
                        f"undelivered by {channel}",
                        after,
                        stamp,
                    )
                )
            )
        return done, actions

    def _tell(self, actions: Sequence[Action]) -> None:
        for action in actions:
            audit.tell("transfer", action)


def _nothing_open(message: str) -> RpcError:
    return RpcError(
        StatusCode.NOT_FOUND,
        "NOT_UNDELIVERED",
        message,
        advice="See `duohuo notifications list`.",
    )
