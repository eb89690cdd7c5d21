"""Somebody guesses at a user's password through the gateways of all centers of a real mesh."""

import json

from tests.integration.conftest import PASSWORD, RunningMesh, wait_until
from tests.integration.test_main_path import new_user

FREE = 5


def test_guesses_through_all_gateways_count_together(mesh: RunningMesh) -> None:
    victim = new_user(mesh.cli, "a", login_at="b")
    kept = mesh.cli.state / "sessions.json"
    hers = json.loads(kept.read_text())
    assert hers["device_proofs"][victim] != ""

    def login(center: str, password: str, proof: str) -> str:
        """The reason, or the center that let somebody in."""
        kept.write_text(json.dumps({**hers, "device_proofs": {victim: proof} if proof else {}}))
        done = mesh.cli.run(
            "login", victim, "--center", center, "-o", "json", DUOHUO_PASSWORD=password
        )
        answer = json.loads(done.stdout)
        reason: str = answer["error"]["reason"] if "error" in answer else answer["origin_center"]
        return reason

    # At most the allowance of each center is spent before each knows of all.
    for number in range(2 * FREE):
        assert login("ab"[number % 2], f"guess-{number}", "") == "BAD_CREDENTIALS"
    for center in ("a", "b"):
        assert login(center, PASSWORD, "") == "BAD_CREDENTIALS"
        assert login(center, PASSWORD, hers["device_proofs"][victim]) == center


def test_what_one_center_has_counted_another_knows_soon(mesh: RunningMesh) -> None:
    victim = new_user(mesh.cli, "a", login_at="a")
    kept = mesh.cli.state / "sessions.json"
    stranger = {**json.loads(kept.read_text()), "device_proofs": {}}
    for number in range(FREE):
        kept.write_text(json.dumps(stranger))
        mesh.cli.run("login", victim, "--center", "a", DUOHUO_PASSWORD=f"guess-{number}")

    def is_locked_at_b() -> bool:
        kept.write_text(json.dumps(stranger))
        return mesh.cli.run("login", victim, "--center", "b").returncode == 1

    wait_until(is_locked_at_b)
