"""The settings of one process, each with its one definition here.

Read from a TOML file (`duohuo serve --config FILE`) and from environment variables (`DUOHUO_` and the
name in capitals; maps and lists as JSON), which win. An unknown name or a bad value stops the start.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, IPvAnyNetwork, StringConstraints, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

Role = Literal["gateway", "account", "session", "transfer"]
ROLES: tuple[Role, ...] = ("gateway", "account", "session", "transfer")
CenterName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]{0,15}$")]
_NOT_OURS = {
    "DUOHUO_PASSWORD",
    "DUOHUO_NEW_PASSWORD",
    "DUOHUO_OPERATOR_TOKEN",
}  # the command line's
Address = Annotated[str, StringConstraints(pattern=r"^.+:\d{1,5}$")]


class CenterSettings(BaseSettings):
    """What one process of one center must know."""

    model_config = SettingsConfigDict(env_prefix="DUOHUO_", extra="forbid")

    center: CenterName
    """This center."""
    centers: list[CenterName] = Field(min_length=1, max_length=16)
    """All centers of the mesh, this one among them."""
    roles: list[Role] = Field(default_factory=lambda: list(ROLES), min_length=1)
    """What this process serves."""
    state_dir: Path
    """Where this process keeps its stores."""
    public_listen: Address = "127.0.0.1:7100"
    """Where users' clients call (gateway role)."""
    operator_listen: Address = "127.0.0.1:7101"
    """Where operators call (gateway role)."""
    mesh_listen: Address = "127.0.0.1:7102"
    """Where other centers, and this center's other processes, call."""
    role_addresses: dict[Role, Address] = Field(default_factory=dict)
    """`mesh_listen` of the roles of this center that other processes serve."""
    peer_addresses: dict[CenterName, Address] = Field(default_factory=dict)
    """`mesh_listen` of each other center's gateway."""
    tls_certificate_file: Path
    """This process's certificate inside the mesh, PEM; see `duohuo certs` and docs/certificates.md."""
    tls_key_file: Path
    """Its private key, PEM. These files are read again when they change."""
    tls_authorities_file: Path
    """The authorities whose certificates are trusted inside the mesh, PEM."""
    tls_revoked_file: Path | None = None
    """Serial numbers of certificates that are not to be trusted any more, one a line, in hexadecimal."""
    health_listen: Address | None = None
    """Where the gRPC health service, and nothing else, is also served without TLS, for probes."""
    public_tls_certificate_file: Path | None = None
    """The certificate for users and operators, PEM; without one, their ports speak no TLS."""
    public_tls_key_file: Path | None = None
    nats_url: Annotated[str, StringConstraints(pattern=r"^tls://.+:\d+$")] = "tls://127.0.0.1:7103"
    """This center's NATS server. Its certificate names it as `nats.<center>.duohuo.internal`."""
    nats_password_file: Path | None = None
    """Holds the password of this process's NATS users (every role but the gateway's)."""
    token_key_file: Path
    """Holds a key, the same in all centers, by which they tell session tokens from made-up ones. To
    exchange it: put the new one on a second line everywhere, then first, then take the old one away."""
    operators_file: Path | None = None
    """Says who this center's operators are (gateway role); see `duohuo operator`."""
    lone_start: bool = False
    """May an empty store begin although not all other centers have said what they have of it? For the
    first start of the first center; should they have more than it knows of, it diverges from them."""
    log_entries_max: Annotated[int, Field(ge=1000)] = 1_000_000
    """So many entries of a topic are kept for a center that stays away; then it needs a snapshot."""
    argon2_memory_kib: Annotated[int, Field(ge=19_456, le=1_048_576)] = 19_456
    """Memory for the hash of a password; the least is OWASP's. Hashes made with other parameters are
    renewed when their users log in."""
    argon2_time_cost: Annotated[int, Field(ge=2, le=20)] = 2
    """Passes over that memory."""
    user_calls_per_s: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    """So many calls a second one user may make at this gateway; twice as many after a silence."""
    address_calls_per_s: Annotated[int, Field(ge=1, le=1_000_000)] = 1_000
    """The same for a client address, behind which may be many users."""
    reflection: bool = True
    """May clients ask the users' port which RPCs it serves (gRPC reflection)?"""
    user_streams_max: Annotated[int, Field(ge=1, le=10_000)] = 20
    """So many streams one user may have open at this gateway."""
    session_lifetime_s: Annotated[int, Field(ge=60, le=90 * 86_400)] = 7 * 86_400
    """A session ends after so long, however much it is used."""
    session_idle_s: Annotated[int, Field(ge=60, le=90 * 86_400)] = 86_400
    """A session ends when it has not been used for so long."""
    failed_logins_max: Annotated[int, Field(ge=2, le=1_000)] = 5
    """So many failed logins of a user are free; then waits follow, but on known devices."""
    address_failed_logins_max: Annotated[int, Field(ge=2, le=1_000_000)] = 100
    """The same for a client address, behind which may be many users."""
    password_confirm_s: Annotated[int, Field(ge=0, le=86_400)] = 0
    """For so long after a password was set, its account's home must confirm it at each login elsewhere:
    then nobody who has just taken over an account gets in while its home is away."""
    webhook_http_allowed: bool = False
    """May users name webhooks that begin with http://?"""
    webhook_networks_allowed: list[IPvAnyNetwork] = Field(default_factory=list, max_length=64)
    """Private and loopback networks that users' webhooks may be in; without any, only public ones."""
    smtp_host: Annotated[str, StringConstraints(min_length=1)] | None = None
    """The mail server that takes notifications; without one, no mail is offered or sent."""
    smtp_port: Annotated[int, Field(ge=1, le=65_535)] = 587
    smtp_tls: Literal["starttls", "implicit", "none"] = "starttls"
    """Encrypted from its greeting on, from its first byte on (port 465, as a rule), or not at all."""
    smtp_from: Annotated[str, StringConstraints(pattern=r"^[!-?A-~]+@[A-Za-z0-9.-]+$")] | None = (
        None
    )
    """The address that mails come from; its domain stands in their Message-IDs."""
    smtp_user: str | None = None
    smtp_password_file: Path | None = None
    """Holds the password of `smtp_user`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "text"] = "json"

    @property
    def bus_roles(self) -> list[str]:
        """Those that use NATS."""
        return [role for role in self.roles if role != "gateway"]

    @model_validator(mode="after")
    def _consistent(self) -> "CenterSettings":
        if self.center not in self.centers:
            raise ValueError(f"centers must contain center {self.center}")
        unknown_peers = set(self.centers) - {self.center} - set(self.peer_addresses)
        if unknown_peers:
            raise ValueError(f"peer_addresses lacks {', '.join(sorted(unknown_peers))}")
        unknown_roles = set(ROLES) - {"gateway"} - set(self.roles) - set(self.role_addresses)
        if unknown_roles:
            raise ValueError(f"role_addresses lacks {', '.join(sorted(unknown_roles))}")
        if "gateway" in self.roles and self.operators_file is None:
            raise ValueError("operators_file is needed by the gateway role")
        if self.bus_roles and self.nats_password_file is None:
            raise ValueError("nats_password_file is needed by every role but the gateway's")
        if (self.public_tls_certificate_file is None) is not (self.public_tls_key_file is None):
            raise ValueError("public_tls_certificate_file and public_tls_key_file go together")
        if self.smtp_host is not None and self.smtp_from is None:
            raise ValueError("smtp_host needs smtp_from")
        if (self.smtp_user is None) is not (self.smtp_password_file is None):
            raise ValueError("smtp_user and smtp_password_file go together")
        if self.smtp_user is not None and self.smtp_tls == "none":
            raise ValueError("smtp_user needs smtp_tls: its password must not travel in the clear")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - not a source of ours
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - not a source of ours
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = TomlConfigSettingsSource(settings_cls)
        return init_settings, env_settings, toml


class UnknownSettingError(ValueError):
    """An environment variable that looks like a setting and is none, such as a misspelt one."""


def load(config: Path | None, **given: object) -> CenterSettings:
    """Settings from what is given (command line), the environment and a TOML file, in this order.

    Raises pydantic.ValidationError with every problem found, UnknownSettingError, or OSError.
    """
    if config is not None and not config.is_file():
        raise FileNotFoundError(f"{config} does not exist")

    known = {f"DUOHUO_{name.upper()}" for name in CenterSettings.model_fields}
    unknown = sorted(
        name for name in os.environ if name.startswith("DUOHUO_") and name not in known | _NOT_OURS
    )
    if unknown:
        raise UnknownSettingError(f"there is no setting {', '.join(unknown)}")

    class FromFile(CenterSettings):
        model_config = SettingsConfigDict(env_prefix="DUOHUO_", extra="forbid", toml_file=config)

    return FromFile(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
