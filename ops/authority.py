"""A certificate authority in a directory, for the inside of one mesh.

    ca.crt        whom everybody trusts: first the authority that issues, then others
    ca.key        the key of that one
    next.crt, next.key    its successor, while there is one that is trusted and issues nothing yet
    revoked       serial numbers that are not to be trusted any more
    <center>/<process>.crt, .key    one for each process, and one for the NATS server

A center needs its own directory, `ca.crt` and `revoked`; keys of authorities stay with whoever issues.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ops import mesh_file
from runtime.identity import name_of

AUTHORITY_DAYS = 3650
DAYS = 90
RENEW_BELOW = 1 / 3
"""A certificate is due for renewal when this part of its days is left."""
_EARLIER = timedelta(hours=1)
"""So much earlier than now they begin, for the sake of clocks that are behind."""


class AuthorityError(Exception):
    """What is in the directory does not allow this; the message is for people."""


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate in the directory."""

    center: str
    process: str
    certificate: x509.Certificate

    @property
    def serial(self) -> int:
        return self.certificate.serial_number

    @property
    def names(self) -> list[str]:
        return [str(name.value) for name in _alternative_names(self.certificate)]

    def is_due(self, now: datetime) -> bool:
        """Is it time to renew it?"""
        begin, end = self.certificate.not_valid_before_utc, self.certificate.not_valid_after_utc
        return end - now < (end - begin) * RENEW_BELOW


class Authority:
    """`now` is a time with a zone."""

    def __init__(self, directory: Path, now: datetime) -> None:
        self.directory = directory
        self.now = now

    def init(self) -> bool:
        """Makes an authority unless there is one; says whether it did."""
        if (self.directory / "ca.key").exists():
            return False
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.revoked_file.exists():
            mesh_file.write_private(self.revoked_file, "")
        certificate, key = self._new_authority()
        self._write("ca.crt", _pem(certificate))
        self._write("ca.key", _key_pem(key))
        return True

    def ensure_center(self, center: str, processes: Mapping[str, Iterable[str]]) -> None:
        """Issues what a center's processes and its NATS server need, unless there are good ones.

        `processes` says which roles each serves.
        """
        for process, roles in processes.items():
            self.ensure(center, process, roles)
        # A local mesh has no name service; NATS servers that call each other there have addresses alone.
        self._ensure(center, "nats", [name_of("nats", center), "127.0.0.1"])

    def ensure(self, center: str, process: str, roles: Iterable[str]) -> None:
        """Issues the certificate of a process that serves these roles unless there is a good one."""
        self._ensure(center, process, [name_of(role, center) for role in sorted(roles)])

    def _ensure(self, center: str, process: str, names: Sequence[str]) -> None:
        present = self._read_issued(center, process)
        if present is None or present.names != names or present.is_due(self.now):
            self.issue(center, process, names)

    def issue(self, center: str, process: str, names: Sequence[str]) -> Issued:
        """Makes a key and a certificate with these names, in place of an earlier one."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer, issuer_key = self.trusted()[0], self._load_key("ca.key")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{process}.{center}")])
        alternatives = [_general_name(name) for name in names]
        usage = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        certificate = (
            self._builder(subject, issuer.subject, DAYS)
            .public_key(key.public_key())
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
                critical=False,
            )
            .sign(issuer_key, hashes.SHA256())
        )
        (self.directory / center).mkdir(mode=0o700, exist_ok=True)
        # The key first: until the certificate follows, processes see that they do not belong together.
        self._write(f"{center}/{process}.key", _key_pem(key))
        self._write(f"{center}/{process}.crt", _pem(certificate))
        return Issued(center, process, certificate)

    def renew(self, *, everything: bool) -> list[Issued]:
        """Issues anew what is due, or everything."""
        due = [one for one in self.issued() if everything or one.is_due(self.now)]
        return [self.issue(one.center, one.process, one.names) for one in due]

    def rotate(self) -> str:
        """Takes the next of three steps that exchange the authority; says which.

        `trust`: a new one is made, and trusted as well. `issue`: all certificates are issued anew, by the
        new one. `retire`: the old one is not trusted any more. Between two steps every process must have
        read what the one before has changed.
        """
        trusted = self.trusted()
        if (self.directory / "next.key").exists():
            successor = _load_all(self.directory / "next.crt")[0]
            others = [one for one in trusted if one != successor]
            self._write("ca.crt", _pem(successor, *others))
            self._write("ca.key", (self.directory / "next.key").read_bytes())
            self.renew(everything=True)
            (self.directory / "next.key").unlink()
            (self.directory / "next.crt").unlink()
            return "issue"
        if len(trusted) > 1:
            self._write("ca.crt", _pem(trusted[0]))
            return "retire"
        successor, key = self._new_authority()
        self._write("next.crt", _pem(successor))
        self._write("ca.crt", _pem(*trusted, successor))
        self._write("next.key", _key_pem(key))
        return "trust"

    def revoke(self, serial: int) -> Issued:
        """Has a certificate not trusted any more. Raises AuthorityError if it is none of ours."""
        found = next((o for o in self.issued() if o.serial == serial), None)
        if found is None:
            raise AuthorityError(f"no certificate here has the serial number {serial:x}")
        self._revoke([found])
        return found

    def revoke_center(self, center: str) -> list[Issued]:
        """Has no certificate of a center trusted any more. Raises AuthorityError if it has none."""
        found = [one for one in self.issued() if one.center == center]
        if not found:
            raise AuthorityError(f"there is no certificate of a center {center} here")
        self._revoke(found)
        return found

    def _revoke(self, some: Iterable[Issued]) -> None:
        revoked = sorted({*self.revoked(), *(one.serial for one in some)})
        mesh_file.write_private(self.revoked_file, "".join(f"{one:x}\n" for one in revoked))

    def revoked(self) -> set[int]:
        return {int(line, 16) for line in self.revoked_file.read_text("ascii").split()}

    def issued(self) -> list[Issued]:
        """All certificates of processes that are here."""
        found = [
            self._read_issued(path.parent.name, path.stem)
            for path in sorted(self.directory.glob("*/*.crt"))
        ]
        return [one for one in found if one is not None]

    def trusted(self) -> list[x509.Certificate]:
        """Whom everybody trusts, first who issues."""
        return _load_all(self.authorities_file)

    @property
    def authorities_file(self) -> Path:
        return self.directory / "ca.crt"

    @property
    def revoked_file(self) -> Path:
        return self.directory / "revoked"

    def _read_issued(self, center: str, process: str) -> Issued | None:
        path = self.directory / center / f"{process}.crt"
        if not path.exists() or not path.with_suffix(".key").exists():
            return None
        return Issued(center, process, _load_all(path)[0])

    def _new_authority(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, f"Duohuo mesh {self.now:%Y-%m-%d %H:%M:%S}")]
        )
        certificate = (
            self._builder(name, name, AUTHORITY_DAYS)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(_SIGNS_CERTIFICATES, critical=True)
            .sign(key, hashes.SHA256())
        )
        return certificate, key

    def _builder(self, subject: x509.Name, issuer: x509.Name, days: int) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now - _EARLIER)
            .not_valid_after(self.now + timedelta(days=days))
        )

    def _load_key(self, name: str) -> ec.EllipticCurvePrivateKey:
        try:
            key = load_pem_private_key((self.directory / name).read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise AuthorityError(f"cannot read {self.directory / name}: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise AuthorityError(f"{self.directory / name} is no key of an elliptic curve")
        return key

    def _write(self, name: str, pem: bytes) -> None:
        mesh_file.write_private(self.directory / name, pem.decode("ascii"))


_SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def now() -> datetime:
    """The time that certificates are dated with."""
    return datetime.now(UTC)


def _load_all(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise AuthorityError(f"cannot read the certificate {path}: {error}") from None


def _alternative_names(certificate: x509.Certificate) -> Sequence[x509.GeneralName]:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return list(extension.value)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(one.public_bytes(Encoding.PEM) for one in certificates)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
