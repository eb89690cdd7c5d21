"""Who is trusted and when certificates end, step by step."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from ops.authority import DAYS, Authority, AuthorityError, Issued
from runtime.credentials import CredentialFiles, Credentials, CredentialsError
from runtime.errors import RpcError
from runtime.identity import Identity, identity_of, name_of

NOW = datetime(2026, 11, 27, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "certs", NOW)
    assert made.init()
    made.ensure("a", "gateway", ["gateway"])
    made.ensure("b", "serve", ["gateway", "account"])
    return made


def later(authority: Authority, days: int) -> Authority:
    return Authority(authority.directory, NOW + timedelta(days=days))


def is_trusted(authority: Authority, issued: Issued, at: datetime = NOW) -> bool:
    policy = PolicyBuilder().store(Store(authority.trusted())).time(at)
    try:
        policy.build_server_verifier(x509.DNSName(issued.names[0])).verify(issued.certificate, [])
    except VerificationError:
        return False
    return True


def test_what_it_issues_is_trusted_for_its_names_and_its_time(authority: Authority) -> None:
    gateway, serve = authority.issued()
    assert gateway.names == ["gateway.a.duohuo.internal"]
    assert serve.names == ["account.b.duohuo.internal", "gateway.b.duohuo.internal"]
    assert is_trusted(authority, gateway)
    assert not is_trusted(authority, gateway, NOW - timedelta(days=1))
    assert not is_trusted(authority, gateway, NOW + timedelta(days=DAYS, minutes=1))
    stranger = Authority(authority.directory.with_name("others"), NOW)
    stranger.init()
    assert not is_trusted(stranger, gateway)


def test_what_is_good_stays_and_what_is_due_is_renewed(authority: Authority) -> None:
    before = authority.issued()
    assert not authority.init()
    authority.ensure("a", "gateway", ["gateway"])
    assert authority.issued() == before
    assert later(authority, DAYS // 2).renew(everything=False) == []
    renewed = later(authority, DAYS * 3 // 4).renew(everything=False)
    assert [one.names for one in renewed] == [one.names for one in before]
    assert not {one.serial for one in renewed} & {one.serial for one in before}
    assert all(is_trusted(authority, one, NOW + timedelta(days=DAYS + 1)) for one in renewed)


def test_a_process_with_other_roles_gets_another_certificate(authority: Authority) -> None:
    authority.ensure("a", "gateway", ["gateway", "session"])
    assert authority.issued()[0].names == [name_of("gateway", "a"), name_of("session", "a")]


def test_an_authority_is_exchanged_in_three_steps(authority: Authority) -> None:
    old = authority.issued()
    assert authority.rotate() == "trust"
    assert len(authority.trusted()) == 2
    assert authority.issued() == old
    authority.renew(everything=True)
    still_by_old = authority.issued()
    assert authority.rotate() == "issue"
    new = authority.issued()
    assert all(is_trusted(authority, one) for one in [*old, *still_by_old, *new])
    assert authority.rotate() == "retire"
    assert len(authority.trusted()) == 1
    assert not any(is_trusted(authority, one) for one in [*old, *still_by_old])
    assert all(is_trusted(authority, one) for one in new)
    assert authority.rotate() == "trust"


def test_an_exchange_that_was_interrupted_goes_on(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority.rotate()
    with monkeypatch.context() as patch:
        patch.setattr(Authority, "renew", _full_disk)
        with pytest.raises(OSError, match="disk"):
            authority.rotate()
    assert authority.rotate() == "issue"
    assert all(is_trusted(authority, one) for one in authority.issued())
    assert authority.rotate() == "retire"
    assert all(is_trusted(authority, one) for one in authority.issued())


def _full_disk(*_: object, **__: object) -> None:
    raise OSError("the disk is full")


def test_only_what_is_there_is_revoked(authority: Authority) -> None:
    gateway, serve = authority.issued()
    authority.revoke(gateway.serial)
    authority.revoke(serve.serial)
    assert authority.revoked() == {gateway.serial, serve.serial}
    with pytest.raises(AuthorityError, match="no certificate here"):
        authority.revoke(1)


def test_keys_are_for_their_owner_only(authority: Authority) -> None:
    for path in authority.directory.rglob("*.key"):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["gateway.a.duohuo.internal"], Identity("a", frozenset({"gateway"}))),
        (
            ["session.b2.duohuo.internal", "gateway.b2.duohuo.internal"],
            Identity("b2", frozenset({"gateway", "session"})),
        ),
        (["gateway.a.duohuo.internal", "gateway.b.duohuo.internal"], None),
        (["gateway.a.duohuo.internal", "example.net"], None),
        (["gateway.a.duohuo.internal.example.net"], None),
        (["gateway.A.duohuo.internal"], None),
        (["*.a.duohuo.internal"], None),
        ([], None),
    ],
)
def test_names_are_those_of_one_centers_roles_or_say_nothing(
    names: list[str], expected: Identity | None
) -> None:
    assert identity_of(names) == expected
    if expected is not None:
        assert Identity.parse(str(expected)) == expected


# --- what a process makes of the files ---------------------------------------------------------------


def files(authority: Authority, center: str, process: str) -> CredentialFiles:
    path = authority.directory / center / f"{process}.crt"
    return CredentialFiles(
        path, path.with_suffix(".key"), authority.authorities_file, authority.revoked_file
    )


def shown(issued: Issued) -> dict[str, list[bytes]]:
    return {"x509_pem_cert": [issued.certificate.public_bytes(Encoding.PEM)]}


def test_only_this_centers_gateway_may_call_for_another(authority: Authority) -> None:
    gateway, serve = authority.issued()
    credentials = Credentials(files(authority, "a", "gateway"), "ab")
    assert credentials.caller(shown(gateway), "", "a") == "a gateway"
    assert credentials.caller(shown(gateway), "b session", "a") == "b session"
    assert credentials.caller(shown(serve), "a transfer", "a") == "b account,gateway"
    account = authority.issue("a", "account", [name_of("account", "a")])
    assert credentials.caller(shown(account), "b session", "a") == "a account"


def test_who_is_revoked_or_shows_nothing_calls_nothing(authority: Authority) -> None:
    gateway, serve = authority.issued()
    authority.revoke(serve.serial)
    credentials = Credentials(files(authority, "a", "gateway"), "ab")
    assert credentials.caller(shown(gateway), "", "a")
    nameless = authority.issue("b", "odd", ["example.net"])
    elsewhere = authority.issue("z", "gateway", [name_of("gateway", "z")])
    for auth in (shown(serve), shown(nameless), shown(elsewhere)):
        with pytest.raises(RpcError) as refused:
            credentials.caller(auth, "a gateway", "a")
        assert refused.value.reason == "ROLE"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: f.key.unlink(), "cannot read"),
        (lambda f: f.key.write_text("nothing"), "unusable"),
        (lambda f: f.certificate.write_text(""), "unusable"),
        (lambda f: f.authorities.write_text("nothing"), "unusable"),
        (lambda f: f.revoked.write_text("not a number"), "unusable"),
        (
            lambda f: f.key.write_bytes(f.authorities.with_name("ca.key").read_bytes()),
            "not the key",
        ),
    ],
)
def test_files_that_cannot_be_used_are_named(
    authority: Authority, damage: object, says: str
) -> None:
    found = files(authority, "a", "gateway")
    assert callable(damage)
    damage(found)
    with pytest.raises(CredentialsError, match=says):
        Credentials(found)
