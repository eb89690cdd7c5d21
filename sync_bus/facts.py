"""Digests that must agree between centers that have applied the same entries."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

from duohuo.v1.operator_service_pb2 import Digest
from runtime.store import Unit
from sync_bus import copies, inbox, log
from sync_bus.log import Topic
from sync_bus.site import Site

EVERY_SOURCE = "*"


def digests(site: Site, topics: Sequence[Topic]) -> Unit[list[Digest]]:
    """What this center holds of each center's entries, and how far it had applied them.

    Digests with the same source, topic and position must be the same everywhere. Topics that merge
    the writes of all centers have one digest, at a position per center.
    """
    applied: dict[str, Mapping[str, int]] = {site.here: (yield from log.heads())}
    incomplete: dict[str, list[str]] = {}
    for peer in site.mesh.peers:
        applied[peer] = yield from inbox.cursors(peer)
        incomplete[peer] = yield from inbox.incomplete(peer)

    def at(source: str, topic: Topic) -> str:
        seq = applied[source].get(topic.name, 0)
        return f"{seq}, incomplete" if topic.name in incomplete.get(source, ()) else str(seq)

    found = []
    for topic in topics:
        if topic.merged:
            position = ",".join(f"{source}={at(source, topic)}" for source in sorted(applied))
            where = {EVERY_SOURCE: position}
        else:
            where = {source: at(source, topic) for source in applied}
        for source, position in where.items():
            digest = yield from digest_of(topic, source)
            found.append(
                Digest(source_center=source, topic=topic.name, position=position, digest=digest)
            )
    return found


def digest_of(topic: Topic, source: str) -> Unit[str]:
    """One value for all that a source's topic adds up to here; for all sources if it is merged."""
    digest = blake2b(digest_size=16)
    for table in topic.tables:
        if not table.digested:
            continue
        digest.update((yield from copies.digest_all(table, source)).encode())
    return digest.hexdigest()
