"""`duohuo certs` as somebody meets it who prepares centers without a mesh of this machine."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.integration.conftest import Cli


@pytest.fixture
def certs(tmp_path: Path) -> "Certs":
    return Certs(tmp_path)


class Certs:
    def __init__(self, directory: Path) -> None:
        self.cli = Cli(directory / "nowhere")
        self.directory = directory / "certs"

    def say(self, *arguments: str) -> str:
        done = self._run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def refuse(self, *arguments: str) -> str:
        done = self._run(*arguments)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stdout + done.stderr

    def _run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.cli.run("certs", command, *arguments, "--directory", str(self.directory))


def test_from_nothing_to_another_authority(certs: Certs) -> None:
    assert "duohuo certs init" in certs.refuse("show")
    assert "Made an authority" in certs.say("init", "--centers", "a,bb")
    assert "There is an authority" in certs.say("init", "--centers", "a,bb")
    names = {str(path.relative_to(certs.directory)) for path in certs.directory.rglob("*.crt")}
    each = ("gateway", "account", "session", "transfer", "nats")
    assert names == {"ca.crt"} | {f"{center}/{one}.crt" for center in ("a", "bb") for one in each}
    assert all(path.stat().st_mode & 0o077 == 0 for path in certs.directory.rglob("*.key"))

    shown = certs.say("show")
    assert len(re.findall(r"^(?:a|bb)/", shown, re.MULTILINE)) == 10
    assert "Nothing is due" in certs.say("renew")
    assert certs.say("show") == shown
    assert len(re.findall(r"^(?:a|bb)/", certs.say("renew", "--all"), re.MULTILINE)) == 10
    assert certs.say("show") != shown

    steps = ("trusted as well", "issued by the new authority", "Only the new authority is trusted")
    for step, authorities in zip(steps, (2, 2, 1), strict=True):
        assert step in certs.say("rotate-ca")
        assert len(re.findall(r"^authority", certs.say("show"), re.MULTILINE)) == authorities


def test_a_certificate_is_revoked_by_the_number_that_is_shown(certs: Certs) -> None:
    certs.say("init")
    found = re.search(r"^b/session +([0-9a-f]+)", certs.say("show"), re.MULTILINE)
    assert found is not None
    assert "b/session is revoked" in certs.say("revoke", found[1])
    assert re.search(rf"^b/session +revoked +{found[1]}", certs.say("show"), re.MULTILINE)
    assert certs.say("revoke", "--center", "a").count("The certificate of a/") == 5
    assert len(re.findall(r"^a/\w+ +revoked", certs.say("show"), re.MULTILINE)) == 5
    assert "no certificate of a center c" in certs.refuse("revoke", "--center", "c")
    assert "Give a serial number" in certs.refuse("revoke")
    assert "no certificate here" in certs.refuse("revoke", "12ab")
    assert "is no serial number" in certs.refuse("revoke", "xyz")


@pytest.mark.parametrize("centers", ["", "a,a", "A", "a,b c"])
def test_centers_need_names(certs: Certs, centers: str) -> None:
    assert "name" in certs.refuse("init", "--centers", centers)
    assert not certs.directory.exists()


def test_what_is_broken_is_named(certs: Certs) -> None:
    certs.say("init")
    (certs.directory / "ca.key").write_text("nonsense")
    assert str(certs.directory / "ca.key") in certs.refuse("renew", "--all").replace("\n", "")
