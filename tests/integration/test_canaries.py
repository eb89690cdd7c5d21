"""Nothing secret or personal gets out: unlikely values are planted wherever a user or an operator can, a
mesh is led through its errors and a crash, and all that it says is searched."""

import json
import os
import signal
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from ops import mesh_file
from ops.client import Sessions
from tests.integration.conftest import RunningMesh, start_mesh, wait_until

PASSWORD, NEW_PASSWORD, WRONG_PASSWORD = "kanarien-alt-1", "kanarien-neu-2", "kanarien-falsch-3"
SECRETS = {
    "password": PASSWORD,
    "new password": NEW_PASSWORD,
    "wrong password": WRONG_PASSWORD,
    "webhook secret": "kanarien-signiert-4",
    "webhook path": "kanarien-pfad-5",
}
ALICE, BOB, NOBODY = "kanarienvogel@example.com", "+8613912345678", "kanariengeist@example.com"
SECOND, LEAVER = "kanarienzweit@example.com", "kanarienflug@example.com"
PERSONAL = {
    "e-mail": ALICE,
    "phone": BOB,
    "unknown identifier": NOBODY,
    "second identifier": SECOND,
    "identifier that is erased": LEAVER,
    "name": "Kanarienname",
    "device": "Kanariengeraet",
    "memo": "Kanarienzweck",
}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[RunningMesh]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUOHUO_WEBHOOK_HTTP_ALLOWED", "true")
        patch.setenv("DUOHUO_WEBHOOK_NETWORKS_ALLOWED", '["127.0.0.0/8"]')
        running = start_mesh(tmp_path / "mesh", said=tmp_path / "supervisor.log")
    yield running
    assert running.stop() == 0


def test_no_canary_gets_out(mesh: RunningMesh, tmp_path: Path) -> None:
    tokens, refusals = _lead_through_everything(mesh, tmp_path)
    canaries = SECRETS | PERSONAL | tokens | _of_the_mesh(mesh.cli.state)
    _absent(canaries, {"refusals": "".join(refusals).encode()})
    _absent(canaries, _logs(tmp_path))
    _absent(canaries, _spans(mesh.cli.state))
    _absent(canaries, _processes(mesh))
    passwords = {name: value for name, value in SECRETS.items() if "password" in name}
    _absent(passwords | tokens, _databases(mesh.cli.state))


def _lead_through_everything(mesh: RunningMesh, tmp_path: Path) -> tuple[dict[str, str], list[str]]:
    """Returns the tokens and proofs of devices, and what was said to those who were refused."""
    cli, refusals, tokens = mesh.cli, list[str](), dict[str, str]()
    wrong, new = {"DUOHUO_PASSWORD": WRONG_PASSWORD}, {"DUOHUO_NEW_PASSWORD": NEW_PASSWORD}

    def refused(*arguments: str, **environment: str) -> None:
        done = cli.run(*arguments, "-o", "json", **{"DUOHUO_PASSWORD": PASSWORD, **environment})
        assert done.returncode == 1, done
        refusals.append(done.stdout + done.stderr)

    def done(*arguments: str, **environment: str) -> None:
        cli.json(*arguments, **{"DUOHUO_PASSWORD": PASSWORD, **environment})

    def logged_in(user: str, center: str, **environment: str) -> None:
        done("login", user, "--device", PERSONAL["device"], "--center", center, **environment)
        tokens[f"token {len(tokens)}"] = Sessions.load(cli.state).of(user).token

    for user in (ALICE, BOB):
        done("register", user, "--name", PERSONAL["name"])
    refused("register", ALICE)
    for center in ("a", "b"):
        logged_in(ALICE, center)
        refused("login", ALICE, "--center", center, **wrong)
        refused("login", NOBODY, "--center", center)
    done("passwd", ALICE, **new)
    refused("passwd", ALICE, **new)
    for user in (ALICE, BOB):
        logged_in(user, "b", DUOHUO_PASSWORD=NEW_PASSWORD if user == ALICE else PASSWORD)
        done("fund", user, "1000")

    done("identifier", "add", SECOND, "--user", ALICE)
    refused("identifier", "add", BOB, "--user", ALICE)
    refused("identifier", "remove", NOBODY, "--user", ALICE)
    refused("register", SECOND)
    done("route", "show", SECOND)
    refused("account", "erase", ALICE, "--yes")  # has money
    done("register", LEAVER, "--name", PERSONAL["name"])
    done("account", "erase", LEAVER, "--yes")
    refused("login", LEAVER, "--center", "b")

    memo = ("--memo", PERSONAL["memo"], "--from", ALICE)
    secret = tmp_path / "secret"
    secret.write_text(SECRETS["webhook secret"])
    hook = f"http://127.0.0.1:1/{SECRETS['webhook path']}"  # nobody listens there
    done("notify", ALICE, "--webhook", hook, "--secret-file", str(secret))
    refused("notify", ALICE, "--webhook", hook.replace("127.0.0.1", "10.0.0.1"))
    done("transfer", BOB, "5", *memo)
    refused("transfer", BOB, "5000", *memo)
    refused("transfer", NOBODY, "5", *memo)
    done("apply", BOB, "5", *memo)
    os.kill(mesh.described["centers"]["a"]["pids"]["serve"], signal.SIGKILL)
    cli.run("transfer", BOB, "5", *memo)  # done or refused
    cli.run("login", ALICE, "--center", "a", **wrong)  # a is gone: b refuses it, by its copy
    done("center", "start", "a")
    refused("login", ALICE, "--center", "a", **wrong)
    wait_until(lambda: cli.run("verify").returncode == 0, within_s=60)
    proofs = Sessions.load(cli.state).device_proofs
    tokens.update({f"device proof {user}": proof for user, proof in proofs.items()})
    for user in (ALICE, BOB):
        cli.json("why", user)
        done("logout", user)
    return tokens, refusals


def _of_the_mesh(state: Path) -> dict[str, str]:
    """What the mesh made up for itself."""
    files = [state / mesh_file.OPERATOR_TOKEN_NAME, state / mesh_file.TOKEN_KEY_NAME]
    passwords = list(state.glob("*/*.nats-password"))
    assert passwords
    made_up = {str(path): path.read_text().strip() for path in (*files, *passwords)}
    control = json.loads((state / "mesh.json").read_text())["control_token"]
    return made_up | {"control token": control}


def _logs(directory: Path) -> dict[str, bytes]:
    found = {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.log")
    }
    assert b"ended by itself" in found["supervisor.log"]
    return found


def _spans(state: Path) -> dict[str, bytes]:
    dumped = {}
    for path in state.rglob("spans.db"):
        with closing(sqlite3.connect(path, timeout=10)) as database:
            dumped[str(path)] = "".join(database.iterdump()).encode()
    return dumped


def _databases(state: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in state.rglob("*.db*")}


def _processes(mesh: RunningMesh) -> dict[str, bytes]:
    """What `ps` shows to everybody, and the environment, which the same user sees."""
    return {
        f"{pid} {name}": Path(f"/proc/{pid}/{name}").read_bytes()
        for pid in [mesh.process.pid, *mesh.pids()]
        for name in ("cmdline", "environ")
    }


def _absent(canaries: Mapping[str, str], places: Mapping[str, bytes]) -> None:
    assert any(places.values()), "nothing to search"
    found = [
        (name, where)
        for name, value in canaries.items()
        for where, content in places.items()
        if value.encode() in content
    ]
    assert not found
