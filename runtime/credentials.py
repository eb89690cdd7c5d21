"""The certificate of this process, and whom it trusts: TLS for gRPC and NATS.

Files are read again when they change, so that certificates and authorities are exchanged without a restart:
servers show the new one at the next handshake, clients open new connections and let old ones end.
"""

import asyncio
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from runtime.identity import certified, no_role

CHECK_INTERVAL_S = 1.0
_log = structlog.get_logger()


class CredentialsError(Exception):
    """The files cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class CredentialFiles:
    """PEM files: a certificate with its chain, its private key, and the authorities that are trusted."""

    certificate: Path
    key: Path
    authorities: Path | None = None
    """Without any, callers need no certificate."""
    revoked: Path | None = None
    """Serial numbers of certificates that are valid and not to be trusted, one a line, in hexadecimal."""


@dataclass(frozen=True, slots=True)
class _Read:
    stamp: Sequence[object]
    certificate: bytes
    key: bytes
    authorities: bytes | None
    revoked: frozenset[int]
    expire_ms: int


class Credentials:
    """What the files say now. Raises CredentialsError when made.

    `centers` are those whose services may call this process.
    """

    def __init__(self, files: CredentialFiles, centers: Sequence[str] = ()) -> None:
        self._files = files
        self._centers = frozenset(centers)
        self._read = _read(files)
        self.generation = 1
        """Grows each time that the files have changed."""

    @property
    def mutual(self) -> bool:
        return self._files.authorities is not None

    @property
    def expire_ms(self) -> int:
        """When the certificate ends, in wall time."""
        return self._read.expire_ms

    async def watch(self) -> None:
        """Keeps looking whether the files have changed. Unusable ones are not taken."""
        refused: Sequence[object] = ()
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            stamp = stamp_of(_paths(self._files))
            if stamp in (self._read.stamp, refused):
                continue
            try:
                self._read = _read(self._files)
            except CredentialsError as error:
                refused = stamp
                _log.error("the new certificate is not used", reason=str(error))
            else:
                self.generation += 1
                _log.info("certificates have changed", certificate=str(self._files.certificate))

    def for_server(self) -> grpc.ServerCredentials:
        shown = self.generation

        def changed() -> grpc.ServerCertificateConfiguration | None:
            """Asked at each handshake, by a thread of gRPC's."""
            nonlocal shown
            if shown == self.generation:
                return None
            shown = self.generation
            return self._configuration()

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            changed,  # type: ignore[arg-type] # None is "no change", which the stubs do not know
            self.mutual,
        )

    def for_channel(self) -> grpc.ChannelCredentials:
        read = self._read
        return grpc.ssl_channel_credentials(read.authorities, read.key, read.certificate)

    def for_client(self) -> ssl.SSLContext:
        """For a connection other than gRPC's. Raises OSError while its files are being exchanged."""
        assert self._read.authorities is not None  # noqa: S101 - only users need not be known
        context = ssl.create_default_context(cadata=self._read.authorities.decode("ascii"))
        context.load_cert_chain(self._files.certificate, self._files.key)
        return context

    def caller(self, auth: Mapping[str, Sequence[Any]], forwarded: str, here: str) -> str:
        """Who calls over a connection with this authentication context.

        This center's own gateway may say for whom it forwards. Raises RpcError ROLE.
        """
        pem = auth.get("x509_pem_cert", [b""])[0]
        found = certified(bytes(pem))
        if found.serial in self._read.revoked:
            raise no_role("this certificate has been revoked")
        if found.identity is None or found.identity.center not in self._centers:
            raise no_role("the certificate names no center of this mesh")
        if forwarded and found.identity.center == here and "gateway" in found.identity.roles:
            return forwarded
        return str(found.identity)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        read = self._read
        return grpc.ssl_server_certificate_configuration(
            [(read.key, read.certificate)], read.authorities
        )


def _paths(files: CredentialFiles) -> list[Path]:
    wanted = (files.certificate, files.key, files.authorities, files.revoked)
    return [path for path in wanted if path is not None]


def stamp_of(paths: Iterable[Path]) -> Sequence[object]:
    """Differs once a file has changed. What is not there has a stamp as well."""
    stamps: list[object] = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((stat.st_mtime_ns, stat.st_ino, stat.st_size))
    return stamps


def _read(files: CredentialFiles) -> _Read:
    stamp = stamp_of(_paths(files))
    try:
        certificate, key = files.certificate.read_bytes(), files.key.read_bytes()
        authorities = files.authorities.read_bytes() if files.authorities else None
        revoked = files.revoked.read_text("ascii") if files.revoked else ""
    except (OSError, UnicodeDecodeError) as error:
        raise CredentialsError(f"cannot read a certificate's file: {error}") from None
    try:
        leaf = x509.load_pem_x509_certificates(certificate)[0]
        if leaf.public_key() != load_pem_private_key(key, None).public_key():
            raise CredentialsError(f"{files.key} is not the key of {files.certificate}")
        if authorities is not None:
            x509.load_pem_x509_certificates(authorities)
        serials = frozenset(int(line, 16) for line in revoked.split())
    except (ValueError, TypeError) as error:
        raise CredentialsError(f"unusable, see {files.certificate}: {error}") from None
    expire_ms = int(leaf.not_valid_after_utc.timestamp() * 1000)
    return _Read(stamp, certificate, key, authorities, serials, expire_ms)
