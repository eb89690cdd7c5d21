"""Digests that must agree between centers that have applied the same entries."""

from collections.abc import Callable, Mapping

from duohuo.v1.operator_service_pb2 import Digest
from runtime.store import Unit
from sync_bus import inbox, log
from sync_bus.log import Topic
from sync_bus.site import Site

EVERY_SOURCE = "*"


def digests(
    site: Site,
    per_source: Mapping[Topic, Callable[[str], Unit[str]]],
    over_all: Mapping[Topic, Callable[[], Unit[str]]],
) -> Unit[list[Digest]]:
    """What this center holds of each center's entries, and how far it had applied them.

    Digests with the same source, topic and position must be the same everywhere. Topics that merge
    the writes of all centers have one digest, at a position per center.
    """
    own = yield from log.heads()
    applied = {site.here: own}
    for peer in site.mesh.peers:
        applied[peer] = dict((yield from inbox.cursors(peer)))
    found = []
    for topic, digest_of in per_source.items():
        for source, positions in applied.items():
            digest = yield from digest_of(source)
            at = str(positions.get(topic.name, 0))
            found.append(Digest(source_center=source, topic=topic.name, position=at, digest=digest))
    for topic, digest_all in over_all.items():
        at = ",".join(
            f"{source}={positions.get(topic.name, 0)}"
            for source, positions in sorted(applied.items())
        )
        digest = yield from digest_all()
        found.append(
            Digest(source_center=EVERY_SOURCE, topic=topic.name, position=at, digest=digest)
        )
    return found
