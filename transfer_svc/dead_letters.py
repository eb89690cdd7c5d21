"""What operators see and do about notifications that were not delivered."""

import structlog
from grpc import StatusCode

from duohuo.v1.operator_service_pb2 import (
    DropNotificationRequest,
    DropNotificationResponse,
    ListNotificationsRequest,
    ListNotificationsResponse,
    RetryNotificationsRequest,
    RetryNotificationsResponse,
)
from runtime.clock import Clock
from runtime.dispatcher import Incoming
from runtime.errors import RpcError, invalid
from runtime.store import Store
from transfer_svc import notifications

_logger = structlog.get_logger()


class DeadLetters:
    """Serves the notifications' part of TransferPeerService."""

    def __init__(self, database: Store, clock: Clock) -> None:
        self._store = database
        self._clock = clock

    async def ListNotifications(
        self, _request: ListNotificationsRequest, _incoming: Incoming
    ) -> ListNotificationsResponse:
        found = await self._store.read(notifications.undelivered())
        return ListNotificationsResponse(deliveries=found)

    async def RetryNotifications(
        self, request: RetryNotificationsRequest, _incoming: Incoming
    ) -> RetryNotificationsResponse:
        noted = request.notification_id
        unit = notifications.retry(noted, self._clock.wall_ms())
        done = await self._store.write("retry notifications", unit)
        if noted and not done:
            raise _nothing_open("it is no dead letter of this center")
        _logger.warning("notifications: retry", notifications=len(done), named=bool(noted))
        return RetryNotificationsResponse(deliveries=done)

    async def DropNotification(
        self, request: DropNotificationRequest, _incoming: Incoming
    ) -> DropNotificationResponse:
        if not request.notification_id:
            raise invalid("notification_id", "must name one notification")
        done = await self._store.write(
            "drop notification",
            notifications.drop(request.notification_id, self._clock.wall_ms()),
        )
        if not done:
            raise _nothing_open("this center has nothing undelivered of it")
        _logger.warning("notifications: drop", notification=request.notification_id)
        return DropNotificationResponse(deliveries=done)


def _nothing_open(message: str) -> RpcError:
    return RpcError(
        StatusCode.NOT_FOUND,
        "NOT_UNDELIVERED",
        message,
        advice="See `duohuo notifications list`.",
    )
