"""Settings that are wrong stop the start, with the name of each and what is wrong with it."""

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from runtime.config import ROLES, load

GOOD: dict[str, Any] = {
    "center": "a",
    "centers": ["a", "b"],
    "state_dir": "/nowhere",
    "peer_addresses": {"b": "127.0.0.1:7202"},
    "tls_certificate_file": "/nowhere/serve.crt",
    "tls_key_file": "/nowhere/serve.key",
    "tls_authorities_file": "/nowhere/ca.crt",
    "nats_password_file": "/nowhere/nats-password",
    "token_key_file": "/nowhere/token-key",
    "operators_file": "/nowhere/operators",
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DUOHUO_")]:
        monkeypatch.delenv(name)


def test_good_settings_serve_all_roles() -> None:
    settings = load(None, **GOOD)
    assert tuple(settings.roles) == ROLES
    assert settings.state_dir == Path("/nowhere")


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"center": None}, "center", "required"),
        ({"center": "A b"}, "center", "pattern"),
        ({"centers": []}, "centers", "at least 1"),
        ({"centers": [f"c{n}" for n in range(17)]}, "centers", "at most 16"),
        ({"centers": ["b"]}, "", "centers must contain center a"),
        ({"centers": ["a", "b", "c", "d"]}, "", "peer_addresses lacks c, d"),
        ({"peer_addresses": {"b": "nowhere"}}, "peer_addresses.b", "pattern"),
        ({"roles": []}, "roles", "at least 1"),
        ({"roles": ["kitchen"]}, "roles.0", "'gateway', 'account', 'session' or 'transfer'"),
        ({"roles": ["gateway"]}, "", "role_addresses lacks account, session, transfer"),
        ({"operators_file": None}, "", "operators_file is needed"),
        ({"nats_password_file": None}, "", "nats_password_file is needed"),
        ({"nats_url": "nats://127.0.0.1:4222"}, "nats_url", "pattern"),
        ({"log_level": "loud"}, "log_level", "'debug', 'info', 'warning' or 'error'"),
        ({"public_listen": "7100"}, "public_listen", "pattern"),
        ({"tls_key_file": None}, "tls_key_file", "required"),
        ({"public_tls_key_file": "/nowhere"}, "", "public_tls_key_file go together"),
        ({"smtp_host": "mail.example.com"}, "", "smtp_host needs smtp_from"),
        ({"smtp_host": ""}, "smtp_host", "at least 1"),
        ({"smtp_from": "Bank <bank@example.com>"}, "smtp_from", "pattern"),
        ({"smtp_port": 0}, "smtp_port", "greater than or equal to 1"),
        ({"smtp_tls": "ssl"}, "smtp_tls", "'starttls', 'implicit' or 'none'"),
        ({"smtp_user": "bank"}, "", "smtp_user and smtp_password_file go together"),
        ({"smtp_password_file": "/nowhere"}, "", "smtp_user and smtp_password_file go together"),
        (
            {"smtp_user": "bank", "smtp_password_file": "/nowhere", "smtp_tls": "none"},
            "",
            "must not travel in the clear",
        ),
        ({"webhook_networks_allowed": ["10.0.0.1/8"]}, "webhook_networks_allowed.0", "network"),
        ({"colour": "green"}, "colour", "not permitted"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_its_reason(
    changes: dict[str, Any], name: str, reason: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        load(None, **{**GOOD, **changes})
    (error,) = caught.value.errors()
    assert ".".join(map(str, error["loc"])) == name
    assert reason in error["msg"]


def test_every_bad_setting_is_named_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        load(None, **{**GOOD, "log_level": "loud", "center": "A"})
    assert {error["loc"][0] for error in caught.value.errors()} == {"log_level", "center"}


def test_a_center_without_the_gateway_needs_no_operators_token() -> None:
    others = {"gateway": "h:1", "session": "h:2", "transfer": "h:3"}
    roles = {"roles": ["account"], "role_addresses": others, "operators_file": None}
    assert load(None, **{**GOOD, **roles}).roles == ["account"]


def test_the_command_line_beats_the_environment_and_that_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.toml"
    file.write_text('log_level = "debug"\nlog_format = "text"\nnats_url = "tls://file:1"\n')
    monkeypatch.setenv("DUOHUO_LOG_FORMAT", "json")
    monkeypatch.setenv("DUOHUO_NATS_URL", "nats://environment:1")
    monkeypatch.setenv("DUOHUO_PEER_ADDRESSES", '{"b": "environment:1"}')
    given = {name: value for name, value in GOOD.items() if name != "peer_addresses"}
    settings = load(file, **given, nats_url="tls://given:1")
    assert settings.nats_url == "tls://given:1"
    assert settings.log_format == "json"
    assert settings.log_level == "debug"
    assert settings.peer_addresses == {"b": "environment:1"}


def test_an_unknown_name_in_the_file_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('colour = "green"\n')
    with pytest.raises(ValidationError, match="colour"):
        load(file, **GOOD)


def test_a_file_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nothing.toml", **GOOD)
