"""Whether this center is drained: it takes nothing new that would stay with it, so that it can be stopped.

Kept here for the whole center, as the account service is what every center has one of.
"""

from duohuo.internal.v1.peer_services_pb2 import CheckHealthRequest, CheckHealthResponse
from duohuo.v1.operator_service_pb2 import SetDrainingRequest, SetDrainingResponse
from runtime.dispatcher import Incoming
from runtime.store import Store, Unit, query
from sync_bus import audit
from sync_bus.log import Stamp
from sync_bus.node import ServiceNode
from sync_bus.site import Site

SCHEMA = """
CREATE TABLE IF NOT EXISTS draining (
  only INTEGER NOT NULL PRIMARY KEY CHECK (only = 1), since_ms INTEGER NOT NULL) STRICT;
"""


def is_draining() -> Unit[bool]:
    rows = yield from query("SELECT 1 FROM draining")
    return bool(rows)


def put(center: str, who: str, stamp: Stamp, *, draining: bool, forced: bool) -> Unit[None]:
    """Begins or ends it; nothing if that was done before."""
    before = yield from is_draining()
    if before == draining:
        return
    if draining:
        yield from query("INSERT INTO draining VALUES (1, ?)", stamp.time_ms)
    else:
        yield from query("DELETE FROM draining")
    action = "drain" if draining else "undrain"
    after = "forced" if forced else ""
    yield from audit.record("account", center, who, action, f"center {center}", "", after, stamp)


class DrainingServicer:
    """Serves SetDraining, and tells of it in answers to CheckHealth."""

    def __init__(self, site: Site, database: Store, node: ServiceNode) -> None:
        self._site = site
        self._store = database
        self._node = node

    async def SetDraining(
        self, request: SetDrainingRequest, incoming: Incoming
    ) -> SetDrainingResponse:
        unit = put(
            self._site.here,
            incoming.operator,
            self._site.stamps.now(),
            draining=request.draining,
            forced=request.forced,
        )
        await self._store.write("drain", unit)
        return SetDrainingResponse()

    async def CheckHealth(
        self, request: CheckHealthRequest, incoming: Incoming
    ) -> CheckHealthResponse:
        found = await self._node.CheckHealth(request, incoming)
        found.draining = await self._store.read(is_draining())
        return found
