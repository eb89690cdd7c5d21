"""`duohuo serve`: one process of one center, with any set of roles.

The only place that knows all roles: it opens the stores, hands the outside world to the services, and
starts the servers. Everything runs under one task group; a bug in any task stops the process.
"""

import asyncio
import json
import os
import signal
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from random import SystemRandom

from google.protobuf.descriptor import FileDescriptor

import account_svc.app
import gateway.app
import session_svc.app
import transfer_svc.app
from account_svc.passwords import Argon2Passwords
from gateway import ring
from gateway.operator import OperatorGate
from runtime import logging, telemetry
from runtime.center import LocalCenter
from runtime.clock import SystemClock
from runtime.config import CenterSettings
from runtime.dispatcher import Dispatcher
from runtime.endpoint import Endpoint
from runtime.grpc_client import GrpcEndpoint
from runtime.grpc_server import GrpcServer
from runtime.hlc import HybridClock
from runtime.ids import RandomIds
from runtime.mesh import Mesh
from runtime.methods import OPERATOR_FILES, PEER_FILES, PUBLIC_FILES, methods_in
from runtime.span_store import SpanStore
from runtime.store import SqliteStore
from sync_bus import node
from sync_bus.jetstream import JetStreamBus, NatsAccess
from sync_bus.log import Stamps, Topic
from sync_bus.site import Site

PLACEMENT_EPOCH = 1
STOP_GRACE_S = 3.0
_OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
Duty = Callable[[], Coroutine[None, None, None]]


class StartError(Exception):
    """The process cannot start; the message says why and what to do."""


async def serve(settings: CenterSettings) -> None:
    """Serves until SIGTERM or SIGINT. Prints one line of JSON when ready. Raises StartError."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    logging.start(settings)
    async with AsyncExitStack() as closing:
        duties, servers = await _start(settings, closing)
        print(json.dumps({"ready": True, "pid": os.getpid()}), flush=True)  # noqa: T201 - read by `up`
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(duty()) for duty in duties]
            await stop.wait()
            # Running calls may still need the duties, such as a transfer that waits to be settled.
            await asyncio.gather(*(server.stop(STOP_GRACE_S) for server in servers))
            for task in running:
                task.cancel()


async def _start(
    settings: CenterSettings, closing: AsyncExitStack
) -> tuple[Sequence[Duty], Sequence[GrpcServer]]:
    """Builds the roles and listens; returns what must run from now on, and the servers to drain."""
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    clock = SystemClock()
    hybrid = HybridClock(clock)
    placement = ring.compute(dict.fromkeys(settings.centers, 1), PLACEMENT_EPOCH)
    spans = SpanStore(settings.state_dir / "spans.db")
    otlp = any(name in os.environ for name in _OTLP_ENDPOINTS)
    closing.callback(telemetry.start(settings.center, settings.roles, [spans], otlp))

    dispatcher = Dispatcher(settings.center, hybrid)
    local = LocalCenter(
        dispatcher,
        {
            role: await _channel(settings.center, address, closing)
            for role, address in settings.role_addresses.items()
        },
    )
    endpoints: dict[str, Endpoint] = {settings.center: local}
    for center in settings.centers:
        if center != settings.center:
            endpoints[center] = await _channel(center, settings.peer_addresses[center], closing)
    mesh = Mesh(settings.center, endpoints, clock)
    site = Site(mesh, placement, Stamps(clock, hybrid), RandomIds(), SystemRandom())
    nats = NatsAccess(settings.center, settings.nats_url, _secret(settings.nats_password_file))
    closing.push_async_callback(nats.close)

    duties: list[Duty] = [mesh.run]
    duties += [
        await _start_service(role, settings, site, nats, dispatcher, closing)
        for role in settings.roles
        if role != "gateway"
    ]
    servers: list[GrpcServer] = []

    async def listen(
        endpoint: Endpoint, files: Sequence[FileDescriptor], address: str, name: str
    ) -> None:
        server = GrpcServer(endpoint, methods_in(files), settings.center, name)
        try:
            await server.start(address)
        except OSError as error:
            raise StartError(f"{error}; is another process using the port?") from error
        servers.append(server)
        closing.push_async_callback(server.stop, 0.0)

    if "gateway" in settings.roles:
        router = gateway.app.build(mesh, placement, clock, spans, dispatcher)
        operators = OperatorGate(dispatcher, _secret(settings.operator_token_file))
        await listen(router, PUBLIC_FILES, settings.public_listen, "gateway")
        await listen(operators, OPERATOR_FILES, settings.operator_listen, "operator")
    await listen(local, [*PEER_FILES, *PUBLIC_FILES], settings.mesh_listen, "mesh")
    return duties, servers


async def _start_service(
    role: str,
    settings: CenterSettings,
    site: Site,
    nats: NatsAccess,
    dispatcher: Dispatcher,
    closing: AsyncExitStack,
) -> Duty:
    bus = JetStreamBus(nats, role, site.mesh.peers)
    path = settings.state_dir / f"{role}.db"
    if role == "account":
        database = await _open(path, account_svc.app.SCHEMA, account_svc.app.TOPICS, site, closing)
        passwords = Argon2Passwords()
        closing.callback(passwords.close)
        return account_svc.app.build(site, database, bus, passwords, dispatcher).run
    if role == "session":
        database = await _open(path, session_svc.app.SCHEMA, session_svc.app.TOPICS, site, closing)
        return session_svc.app.build(site, database, bus, dispatcher).run
    database = await _open(path, transfer_svc.app.SCHEMA, transfer_svc.app.TOPICS, site, closing)
    return transfer_svc.app.build(site, database, bus, dispatcher).run


async def _open(
    path: Path, schema: str, topics: Sequence[Topic], site: Site, closing: AsyncExitStack
) -> SqliteStore:
    """Opens a service's store, and moves the clock past everything that it has seen."""
    try:
        database = await SqliteStore.open(path, node.SCHEMA + schema)
    except sqlite3.Error as error:
        raise StartError(f"cannot open {path}: {error}") from error
    closing.push_async_callback(database.close)
    latest = await database.write("prepare", node.prepare(topics, site.mesh.peers))
    site.stamps.hybrid.latest = max(site.stamps.hybrid.latest, latest)
    return database


async def _channel(name: str, address: str, closing: AsyncExitStack) -> GrpcEndpoint:
    endpoint = GrpcEndpoint(name, address)
    closing.push_async_callback(endpoint.close)
    return endpoint


def _secret(path: Path | None) -> str:
    assert path is not None  # noqa: S101 - checked by CenterSettings
    try:
        secret = path.read_text().strip()
    except OSError as error:
        raise StartError(f"cannot read the secret in {path}: {error.strerror}") from error
    if not secret:
        raise StartError(f"the secret in {path} is empty")
    return secret
