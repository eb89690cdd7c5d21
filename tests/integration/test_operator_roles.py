"""Operators with names and roles, on a real mesh: added, looking, acting, on record, and removed."""

import stat

from tests.integration.conftest import RunningMesh
from tests.integration.test_main_path import new_user


def test_a_viewer_looks_an_operator_acts_and_it_is_on_record(mesh: RunningMesh) -> None:
    user = new_user(mesh.cli, "a", 100)
    made = {
        name: mesh.cli.json("operator", "add", name, "--role", role, "--days", "30")
        for name, role in (("vic", "viewer"), ("ann", "operator"))
    }
    listed = {one["name"]: one for one in mesh.cli.json("operator", "list")["operators"]}
    assert listed.keys() == {"operator", "vic", "ann"}
    assert "token" not in listed["vic"]
    file = mesh.cli.state / "operators"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert made["vic"]["token"] not in file.read_text()

    viewer = {"DUOHUO_OPERATOR_TOKEN": made["vic"]["token"]}
    assert mesh.cli.run("account", "show", user, **viewer).returncode == 0
    refused = mesh.cli.run("account", "freeze", user, "-o", "json", **viewer)
    assert refused.returncode == 1
    assert "OPERATOR_ROLE" in refused.stdout
    mesh.cli.json("account", "freeze", user, DUOHUO_OPERATOR_TOKEN=made["ann"]["token"])
    audited = mesh.cli.json("audit", "list")["actions"]
    assert [one["who"] for one in audited if one["action"] == "set status"] == ["ann"]

    mesh.cli.json("operator", "remove", "vic")
    gone = mesh.cli.run("account", "show", user, "-o", "json", **viewer)
    assert "OPERATOR_TOKEN_INVALID" in gone.stdout
    again = mesh.cli.refused("operator", "remove", "vic")
    assert "no operator vic" in again["message"]
