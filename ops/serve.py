"""`duohuo serve`: one process of one center, with any set of roles.

The only place that knows all roles: it opens the stores, hands the outside world to the services, and
starts the servers. Everything runs under one task group; a bug in any task stops the process.
"""

import asyncio
import json
import os
import signal
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from random import SystemRandom

from google.protobuf.descriptor import FileDescriptor

from account_svc.passwords import Argon2Passwords
from gateway import ring
from gateway.limits import Limits
from gateway.operator_gate import OperatorGate
from ops import wiring
from runtime import logging, telemetry
from runtime.center import LocalCenter
from runtime.clock import SystemClock
from runtime.config import CenterSettings, load
from runtime.credentials import CredentialFiles, Credentials, CredentialsError
from runtime.destinations import Destinations, system_resolve
from runtime.dispatcher import Dispatcher
from runtime.endpoint import Endpoint
from runtime.grpc_client import GrpcEndpoint
from runtime.grpc_server import FROM_PROBES, FROM_THE_MESH, FROM_USERS, Accepts, GrpcServer
from runtime.hlc import HybridClock
from runtime.identity import name_of
from runtime.ids import RandomIds
from runtime.mesh import Mesh
from runtime.methods import OPERATOR_FILES, PEER_FILES, PUBLIC_FILES, methods_in
from runtime.operators import parse
from runtime.span_store import SpanStore
from runtime.store import SqliteStore
from runtime.token_seal import TokenSeal
from session_svc.guard import Allowances
from session_svc.sessions import Lifetimes
from sync_bus.jetstream import JetStreamBus, NatsAccess
from sync_bus.log import Stamps
from sync_bus.site import Site
from transfer_svc.mail_client import MailClient, MailServer
from transfer_svc.outward import Outward
from transfer_svc.webhook_client import WebhookClient

PLACEMENT_EPOCH = 1
STOP_GRACE_S = 3.0
PEERS_TIMEOUT_S = 2.0
_OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class StartError(Exception):
    """The process cannot start; the message says why and what to do."""


async def serve(settings: CenterSettings) -> None:
    """Serves until SIGTERM or SIGINT. Prints one line of JSON when ready. Raises StartError."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    logging.start(settings)
    async with AsyncExitStack() as closing:
        mesh, center, servers, credentials = await _start(settings, closing)
        async with asyncio.TaskGroup() as tasks:
            duties = [*center.duties, *(one.watch for one in credentials)]
            running = [tasks.create_task(duty()) for duty in duties]
            # Centers that start together should not take each other for lost; one that is really
            # away must not hold this one up, nor one that has not what an empty store waits for.
            await mesh.wait_for_peers(PEERS_TIMEOUT_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(PEERS_TIMEOUT_S):
                    await asyncio.gather(*(wait() for wait in center.wait_alive))
            ready = {"ready": True, "pid": os.getpid()}
            print(json.dumps(ready), flush=True)  # noqa: T201 - the supervisor reads it
            await stop.wait()
            # Running calls may still need the duties, such as a transfer that waits to be settled.
            await asyncio.gather(*(server.stop(STOP_GRACE_S) for server in servers))
            for task in running:
                task.cancel()


async def _start(
    settings: CenterSettings, closing: AsyncExitStack
) -> tuple[Mesh, wiring.Center, Sequence[GrpcServer], Sequence[Credentials]]:
    """Builds the roles and listens; returns them with the servers to drain and the files to watch."""
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    clock = SystemClock()
    hybrid = HybridClock(clock)
    placement = ring.compute(dict.fromkeys(settings.centers, 1), PLACEMENT_EPOCH)
    spans = SpanStore(settings.state_dir / "spans.db")
    otlp = os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp" and any(
        name in os.environ for name in _OTLP_ENDPOINTS
    )
    closing.callback(telemetry.start(settings.center, settings.roles, [spans], otlp))

    own = mesh_credentials(settings, clock)
    credentials = [own]

    def channel(center: str, role: str, address: str) -> GrpcEndpoint:
        endpoint = GrpcEndpoint(center, address, own, name_of(role, center))
        closing.push_async_callback(endpoint.close)
        return endpoint

    dispatcher = Dispatcher(settings.center, hybrid)
    elsewhere: dict[str, Endpoint] = {
        role: channel(settings.center, role, address)
        for role, address in settings.role_addresses.items()
    }
    local = LocalCenter(dispatcher, elsewhere)
    endpoints: dict[str, Endpoint] = {settings.center: local}
    for peer in settings.centers:
        if peer != settings.center:
            endpoints[peer] = channel(peer, "gateway", settings.peer_addresses[peer])
    mesh = Mesh(settings.center, endpoints, clock)
    site = Site(
        mesh,
        placement,
        Stamps(clock, hybrid),
        RandomIds(),
        SystemRandom(),
        settings.lone_start,
        settings.log_entries_max,
    )
    nats = nats_access(settings, own)
    closing.push_async_callback(nats.close)
    passwords = Argon2Passwords(settings.argon2_memory_kib, settings.argon2_time_cost)
    closing.callback(passwords.close)

    async def open_store(role: str, schema: str) -> SqliteStore:
        path = settings.state_dir / f"{role}.db"
        try:
            store = await SqliteStore.open(path, schema)
        except sqlite3.Error as error:
            raise StartError(f"cannot open {path}: {error}") from error
        closing.push_async_callback(store.close)
        return store

    destinations = Destinations(
        system_resolve,
        settings.webhook_http_allowed,
        [str(network) for network in settings.webhook_networks_allowed],
    )
    webhooks = WebhookClient(destinations)
    closing.push_async_callback(webhooks.close)
    mail_server = _mail_server(settings) if "transfer" in settings.roles else None
    outside = wiring.Outside(
        open_store,
        lambda role: JetStreamBus(nats, role, mesh.peers),
        passwords,
        spans,
        Outward(webhooks, MailClient(mail_server)),
        destinations,
        _token_seal(settings),
        email_offered=settings.smtp_host is not None,
        limits=Limits(
            settings.user_calls_per_s,
            settings.address_calls_per_s,
            settings.user_streams_max,
        ),
        lifetimes=Lifetimes(
            settings.session_lifetime_s * 1000,
            settings.session_idle_s * 1000,
            settings.password_confirm_s * 1000,
        ),
        allowances=Allowances(
            identifier=settings.failed_logins_max, address=settings.address_failed_logins_max
        ),
    )
    center = await wiring.build(settings.roles, site, outside, dispatcher)
    servers: list[GrpcServer] = []

    async def listen(
        endpoint: Endpoint,
        files: Sequence[FileDescriptor],
        address: str,
        name: str,
        accepts: Accepts,
        shown: Credentials | None,
    ) -> GrpcServer:
        server = GrpcServer(endpoint, methods_in(files), settings.center, name, accepts, shown)
        try:
            await server.start(address)
        except OSError as error:
            raise StartError(f"{error}; is another process using the port?") from error
        servers.append(server)
        closing.push_async_callback(server.stop, 0.0)
        return server

    if center.gateway is not None:
        router, health = center.gateway.router, center.gateway.health
        operators = OperatorGate(dispatcher, _operators(settings.operators_file), clock)
        users = FROM_USERS._replace(reflection=settings.reflection)
        public = _public_credentials(settings)
        credentials += [public] if public else []
        entrance = await listen(
            router, PUBLIC_FILES, settings.public_listen, "gateway", users, public
        )
        health.on_draining = lambda draining: entrance.tell(serving=not draining)
        await listen(
            operators, OPERATOR_FILES, settings.operator_listen, "operator", FROM_USERS, public
        )
    served = [*PEER_FILES, *PUBLIC_FILES]
    await listen(local, served, settings.mesh_listen, "mesh", FROM_THE_MESH, own)
    if settings.health_listen is not None:
        await listen(local, [], settings.health_listen, "health", FROM_PROBES, None)
    return mesh, center, servers, credentials


def nats_access(settings: CenterSettings, credentials: Credentials) -> NatsAccess:
    """How this process reaches its center's NATS server. Raises StartError."""
    roles = settings.bus_roles
    password = _secret(settings.nats_password_file) if roles else ""
    return NatsAccess(settings.center, settings.nats_url, roles, password, credentials)


def nats_access_of(config: Path) -> NatsAccess:
    """What the process with this settings file has, for benchmarks and tests. Raises StartError."""
    settings = load(config)
    return nats_access(settings, mesh_credentials(settings, SystemClock()))


def mesh_credentials(settings: CenterSettings, clock: SystemClock) -> Credentials:
    """What this process shows the others. Raises StartError unless it can be used now."""
    files = CredentialFiles(
        settings.tls_certificate_file,
        settings.tls_key_file,
        settings.tls_authorities_file,
        settings.tls_revoked_file,
    )
    try:
        credentials = Credentials(files, settings.centers)
    except CredentialsError as error:
        raise StartError(f"{error}; `duohuo certs` makes certificates") from None
    if credentials.expire_ms < clock.wall_ms():
        raise StartError(
            f"the certificate {files.certificate} has expired; `duohuo certs renew` makes new ones"
        )
    return credentials


def _public_credentials(settings: CenterSettings) -> Credentials | None:
    certificate, key = settings.public_tls_certificate_file, settings.public_tls_key_file
    if certificate is None or key is None:
        return None
    try:
        return Credentials(CredentialFiles(certificate, key))
    except CredentialsError as error:
        raise StartError(str(error)) from None


def _mail_server(settings: CenterSettings) -> MailServer | None:
    if settings.smtp_host is None:
        return None
    assert settings.smtp_from is not None  # noqa: S101 - checked by CenterSettings
    password = "" if settings.smtp_user is None else _secret(settings.smtp_password_file)
    return MailServer(
        settings.smtp_host,
        settings.smtp_port,
        settings.smtp_tls,
        settings.smtp_from,
        settings.smtp_user or "",
        password,
    )


def _token_seal(settings: CenterSettings) -> TokenSeal:
    path = settings.token_key_file
    try:
        return TokenSeal([line.encode() for line in _secret(path).split()])
    except ValueError as error:
        raise StartError(f"{error}; see {path}") from error


def _operators(path: Path | None) -> Callable[[], str]:
    """Reads the file of this center's operators. Raises StartError unless it is in order now."""
    assert path is not None  # noqa: S101 - checked by CenterSettings
    try:
        parse(path.read_text())
    except (OSError, ValueError) as error:
        raise StartError(f"cannot read the operators in {path}: {error}") from error
    return path.read_text


def _secret(path: Path | None) -> str:
    assert path is not None  # noqa: S101 - checked by CenterSettings
    try:
        secret = path.read_text().strip()
    except OSError as error:
        raise StartError(f"cannot read the secret in {path}: {error.strerror}") from error
    if not secret:
        raise StartError(f"the secret in {path} is empty")
    return secret
