"""What must be in place before a local mesh starts: its directory, its secrets, everybody's settings.

Read it from the bottom: `write_config` writes the files of a center, `settings` says what one
process is told, `locked` keeps the directory for one mesh.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ops import authority, mesh_file, nats_config
from ops.ports import HOST, ROLES, PortPlan, address
from runtime.operators import Operator, token_hash

_PASSWORD_VARIABLES = ("DUOHUO_PASSWORD", "DUOHUO_NEW_PASSWORD", "DUOHUO_OPERATOR_TOKEN")


class StartError(Exception):
    """The mesh did not start, and nothing of it is left running. The message is for people."""


def find_nats_server() -> str:
    """The program, from where this Python's packages were installed. Raises StartError."""
    ours = Path(sys.executable).with_name("nats-server")
    found = str(ours) if ours.exists() else shutil.which("nats-server")
    if found is None:
        raise StartError(f"there is no {ours}; install Duohuo again, with `make install`")
    return found


def check_ports(wanted: Iterable[tuple[int, str]]) -> None:
    """Raises StartError if one of these ports cannot be had. Each comes with what it is for."""
    for port, purpose in wanted:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                why = "is in use" if error.errno == errno.EADDRINUSE else f"fails: {error.strerror}"
                raise StartError(
                    f"port {port}, for {purpose}, {why}; stop what uses it, or choose other ports "
                    "with --port-base"
                ) from None


@contextmanager
def locked(state_dir: Path) -> Iterator[None]:
    """Makes the state directory and holds it, so that only one mesh uses it. Raises StartError."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(state_dir / mesh_file.LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartError(
            f"cannot keep the mesh's state in {state_dir}: {error.strerror}; choose another "
            "directory with --state"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise StartError(
            f"a mesh is already running on {state_dir}; stop it first, or choose another directory "
            "with --state"
        ) from None
    try:
        yield
    finally:
        os.close(lock)


def roles_by_process(*, split: bool) -> dict[str, Sequence[str]]:
    """Which process of a center serves which roles."""
    return {role: [role] for role in ROLES} if split else {"serve": ROLES}


def config_name(process: str) -> str:
    """The name of a process's settings file, in the directory of its center."""
    return "center.toml" if process == "serve" else f"{process}.toml"


def nats_password_file(directory: Path, process: str) -> Path:
    """Where the NATS password of a process is, in the directory of its center."""
    return directory / f"{process}.nats-password"


def nats_certificate_files(state_dir: Path, center: str) -> tuple[Path, Path, Path]:
    """The certificate of a center's NATS server, its key, and whom it trusts."""
    certificates = state_dir / mesh_file.CERTIFICATES_NAME
    own = certificates / center / "nats"
    return own.with_suffix(".crt"), own.with_suffix(".key"), certificates / "ca.crt"


def settings(
    center: str,
    processes: Mapping[str, Sequence[str]],
    process: str,
    ports: PortPlan,
    state_dir: Path,
) -> dict[str, object]:
    """What `runtime.config` must know in one process of a center."""
    own = ports.centers[center]
    roles = processes[process]
    certificates = state_dir / mesh_file.CERTIFICATES_NAME
    return {
        "center": center,
        "centers": list(ports.centers),
        "roles": list(roles),
        "state_dir": str(state_dir / center / "stores"),
        "public_listen": address(own.gateway),
        "operator_listen": address(own.operator),
        "mesh_listen": address(own.mesh[roles[0]]),
        "role_addresses": {
            role: address(own.mesh[others[0]])
            for others in processes.values()
            for role in others
            if role not in roles
        },
        "peer_addresses": {peer: address(port) for peer, port in own.grpc_links.items()},
        "tls_certificate_file": str(certificates / center / f"{process}.crt"),
        "tls_key_file": str(certificates / center / f"{process}.key"),
        "tls_authorities_file": str(certificates / "ca.crt"),
        "tls_revoked_file": str(certificates / "revoked"),
        "nats_url": f"tls://{address(own.nats)}",
        "nats_password_file": str(nats_password_file(state_dir / center, process)),
        "token_key_file": str(state_dir / mesh_file.TOKEN_KEY_NAME),
        "operators_file": str(state_dir / mesh_file.OPERATORS_NAME),
    }


def environment(decided: Iterable[str]) -> dict[str, str]:
    """What children inherit: nothing that overrides what the mesh has decided, no user's password."""
    defaults = {
        "DUOHUO_USER_CALLS_PER_S": "10000",
        "DUOHUO_ADDRESS_CALLS_PER_S": "100000",
        "DUOHUO_ADDRESS_FAILED_LOGINS_MAX": "10000",
    }
    hidden = {f"DUOHUO_{name.upper()}" for name in decided} | set(_PASSWORD_VARIABLES)
    # On one machine all users, and all load generators, have one address.
    return defaults | {name: value for name, value in os.environ.items() if name not in hidden}


def _toml_value(value: object) -> str:
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + " }"
        )
    # A string or a list of strings is written the same in both languages.
    return json.dumps(value, ensure_ascii=False)


def to_toml(values: Mapping[str, object]) -> str:
    """Strings, lists of strings and maps of strings as TOML."""
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in values.items())


def _secret(path: Path) -> str:
    """The secret in the file, made the first time."""
    if not path.exists():
        mesh_file.write_private(path, secrets.token_hex(24) + "\n")
    return path.read_text("utf-8").strip()


def write_configs(state_dir: Path, ports: PortPlan, *, split: bool) -> None:
    """Makes the mesh's secrets, and what `write_config` makes of all centers. Raises OSError."""
    for name in (mesh_file.TOKEN_KEY_NAME, mesh_file.OPERATOR_TOKEN_NAME):
        _secret(state_dir / name)
    operators = state_dir / mesh_file.OPERATORS_NAME
    if not operators.exists():
        hashed = token_hash(_secret(state_dir / mesh_file.OPERATOR_TOKEN_NAME))
        mesh_file.write_private(operators, Operator("operator", "operator", hashed).line() + "\n")
    certify(state_dir, list(ports.centers), split=split)
    for name in ports.centers:
        write_config(state_dir, ports, name, split=split)


def certify(state_dir: Path, centers: Sequence[str], *, split: bool) -> None:
    """Makes what certificates are missing, and anew those that are due. Raises StartError, OSError."""
    try:
        made = authority.Authority(state_dir / mesh_file.CERTIFICATES_NAME, authority.now())
        made.init()
        for center in centers:
            made.ensure_center(center, roles_by_process(split=split))
    except authority.AuthorityError as error:
        raise StartError(str(error)) from None


def write_config(state_dir: Path, ports: PortPlan, center: str, *, split: bool) -> None:
    """Makes a center's directories, and every file that its processes read. Raises OSError."""
    own, directory = ports.centers[center], state_dir / center
    for part in (directory, directory / "stores", directory / "nats"):
        part.mkdir(mode=0o700, exist_ok=True)
    processes = roles_by_process(split=split)
    server = nats_config.NatsServer(
        center=center,
        client_port=own.nats,
        leaf_port=own.nats_leaf,
        monitor_port=own.nats_monitor,
        links=own.nats_links,
        store_dir=directory / "nats",
        certificate_files=nats_certificate_files(state_dir, center),
        clients=[
            nats_config.NatsClient(users, _secret(nats_password_file(directory, process)))
            for process, roles in processes.items()
            if (users := [role for role in roles if role != "gateway"])
        ],
    )
    mesh_file.write_private(directory / "nats.conf", nats_config.render(server))
    for process in processes:
        text = to_toml(settings(center, processes, process, ports, state_dir))
        mesh_file.write_private(directory / config_name(process), text)
