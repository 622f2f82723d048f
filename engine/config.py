"""`engine.toml`, and what the command line sets over it.

Invariants
  1. A configuration is immutable and whole: every key is known, every value was checked, files it names were read.
  2. Values given by a caller (`overrides`) stand over those of the file, key by key; both are checked alike.
  3. A secret is never part of a message.

    host = "127.0.0.1"
    port = 3210
    public_url = "https://api.example"              # where clients reach it, if not at host and port: behind a proxy
    allowed_origins = ["https://app.example"]       # none: any origin, since no cookie ever signs anybody in
    trusted_proxies = ["10.0.0.0/8"]                # whose X-Forwarded-For says where a request comes from

    [limits]
    run_ms_max = 2_000                              # any name of `limits.py`

    [per_ip]                                        # without this table no address is bounded, and loopback never is
    connection_count_max = 200                      # any name of `PerIp`, as its comments say

    [rate_limits."chat:send"]                       # over what a module of functions/ declares
    count = 5
    seconds = 10

    [[auth.providers]]
    issuer = "https://login.example/"
    audience = "my-app"
    jwks = "https://login.example/.well-known/jwks.json"   # or a file, or the JSON itself
    algorithms = ["RS256"]                          # default: RS256, ES256, EdDSA

    [storage]                                       # uploaded files: beside the database, unless a bucket is named
    bucket = "live-files"                           # the other keys: `storage/s3.py`

    [app]                                           # the app's own settings: `functions/settings.py`
    max_viewers = 10

    [policies]
    deny = ["*"]                                    # tables (or all) that clients reach only through a @policy

    [admin]
    key_sha256 = ["…"]                              # `engine admin-key` makes one; two while one replaces the other
"""

import os
import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import msgspec

from engine.auth.jwks import key_set_of, parse_key_set
from engine.auth.providers import DEFAULT_ALGORITHMS, HMAC_ALGORITHM, AuthProvider, FixedKeys, RemoteKeys, SharedSecret
from engine.errors import ConfigError
from engine.functions.rate_limits import RateOverride
from engine.functions.settings import VARIABLE_PREFIX, Given
from engine.limits import Limits, PerIp
from engine.storage.s3 import S3Location

CONFIG_FILE = "engine.toml"
Mode = Literal["development", "production"]
MODES: tuple[Mode, ...] = get_args(Mode)
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")

_ADMIN_KEY_COUNT_MAX = 2  # the old one and the new one while it is replaced
_SHOWN_LENGTH_MAX = 80
_ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")  # as browsers send it: IDN in punycode


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """How one engine runs."""

    mode: Mode = "production"  # development: errors and log lines reach the client whole
    host: str = "127.0.0.1"
    port: int = 3210  # 0: any free one
    allowed_origins: tuple[str, ...] = ()  # scheme://host[:port] each; empty: any
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()  # whose X-Forwarded-For is believed
    limits: Limits = Limits()
    per_ip: PerIp | None = None  # None: no address is bounded
    rate_limits: Mapping[str, RateOverride] = {}  # by the name of the rate limit
    providers: tuple[AuthProvider, ...] = ()
    denied_tables: tuple[str, ...] = ()  # reached by clients through a policy only; "*": all
    admin_key_digests: tuple[str, ...] = ()  # SHA-256, lower-case hexadecimal
    public_url: str | None = None  # scheme://host[:port] where clients reach it; None: as it listens
    storage: S3Location | None = None  # None: files lie beside the database

    @property
    def is_public(self) -> bool:
        """Whether other machines can reach the port."""
        return self.host not in LOOPBACK_HOSTS


class _Provider(msgspec.Struct, forbid_unknown_fields=True):
    """`[[auth.providers]]` as it is written."""

    issuer: str
    audience: str | list[str]
    jwks: str | dict[str, Any] | None = None
    secret: str | None = None
    algorithms: list[str] | None = None
    jwks_private_network: bool = False


class _Auth(msgspec.Struct, forbid_unknown_fields=True):
    providers: list[_Provider] = []


class _Admin(msgspec.Struct, forbid_unknown_fields=True):
    key_sha256: list[str] = []


class _Policies(msgspec.Struct, forbid_unknown_fields=True):
    deny: list[str] = []


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """`engine.toml` as it is written."""

    mode: str = "production"
    host: str = "127.0.0.1"
    port: int = 3210
    allowed_origins: list[str] = []
    trusted_proxies: list[str] = []
    public_url: str | None = None
    limits: Limits = Limits()
    per_ip: PerIp | None = None
    rate_limits: dict[str, RateOverride] = {}
    auth: _Auth = msgspec.field(default_factory=_Auth)
    admin: _Admin = msgspec.field(default_factory=_Admin)
    policies: _Policies = msgspec.field(default_factory=_Policies)
    storage: S3Location | None = None
    app: dict[str, Any] = {}  # read by `read_settings`, each time anew


def load_config(app_dir: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of the app in a directory; `overrides` has the shape of the file, and may be partial.

    Raises `ConfigError` with the file, the key, the value and what was expected. No file: all defaults.
    """
    path = Path(app_dir) / CONFIG_FILE
    return _Loader(path, _read_toml(path), overrides or {}).load()


def read_settings(app_dir: str | Path, options: Mapping[str, Any]) -> dict[str, Given]:
    """What is set for the app: `[app]` of its file, over it the variables `APP_*`, over both `options`."""
    path = Path(app_dir) / CONFIG_FILE
    table = _read_toml(path).get("app", {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: app: expected a table, [app]")
    given = {name: Given(f"{path}: app.{name}", value) for name, value in table.items()}
    for variable, text in os.environ.items():
        if variable.startswith(VARIABLE_PREFIX):
            name = variable.removeprefix(VARIABLE_PREFIX).lower()
            given[name] = Given(f"the variable {variable}", text, is_text=True)
    return given | {name: Given(f"options: app.{name}", value) for name, value in options.items()}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as cause:
        raise ConfigError(f"{path}: {cause}") from cause


class _Loader:
    """One loading: keeps what errors are told with."""

    def __init__(self, path: Path, written: dict[str, Any], overrides: Mapping[str, Any]) -> None:
        self._path, self._overrides = path, overrides
        self._values = _merged(written, overrides)  # 2

    def load(self) -> Config:
        self._check_keys(self._values, _File, "")
        try:
            file = msgspec.convert(self._values, _File)
        except msgspec.ValidationError as cause:
            message, _, key = str(cause).partition(" - at `$.")
            raise self._error(key.rstrip("`"), _in_words_of_toml(message)) from cause
        self._check_limits("limits", file.limits)
        if file.per_ip is not None:
            self._check_limits("per_ip", file.per_ip)
        if file.mode not in MODES:
            raise self._error("mode", f"expected {' or '.join(MODES)}")
        if not file.host or not file.host.isprintable():
            raise self._error("host", "expected a host name or an address")
        if not 0 <= file.port <= 65_535:
            raise self._error("port", "expected 0 to 65535; 0 takes any free port")
        return Config(
            mode=file.mode,
            host=file.host,
            port=file.port,
            allowed_origins=tuple(
                self._origin(f"allowed_origins[{index}]", text) for index, text in enumerate(file.allowed_origins)
            ),
            trusted_proxies=tuple(self._network(index, text) for index, text in enumerate(file.trusted_proxies)),
            limits=file.limits,
            per_ip=file.per_ip,
            rate_limits=file.rate_limits,
            providers=tuple(
                self._provider(f"auth.providers[{i}]", p, file.mode) for i, p in enumerate(file.auth.providers)
            ),
            denied_tables=tuple(file.policies.deny),
            admin_key_digests=self._digests(file.admin.key_sha256),
            public_url=None if file.public_url is None else self._origin("public_url", file.public_url.rstrip("/")),
            storage=file.storage,
        )

    def _where(self, key: str) -> str:
        return "options" if _value_at(self._overrides, key) is not None else str(self._path)

    def _error(self, key: str, expectation: str, *, is_value_shown: bool = True) -> ConfigError:
        """`engine.toml: limits.run_ms_max = "x": expected int, got str`."""
        value = _value_at(self._values, key)
        # 3: a key may stand where its digest should, and a setting may be anything
        is_secret = key.endswith(".secret") or key.startswith("admin.") or key == "app"
        is_value_shown &= isinstance(value, str | int | float) and not is_secret
        shown = f" = {repr(value)[:_SHOWN_LENGTH_MAX]}" if is_value_shown else ""
        return ConfigError(f"{self._where(key)}: {key or 'the file'}{shown}: {expectation}")

    def _check_keys(self, values: object, struct: type[msgspec.Struct], prefix: str) -> None:
        """Every key is a field; tables inside are checked likewise."""
        if not isinstance(values, Mapping):
            return  # `convert` says what was expected
        fields = {field.name: field.type for field in msgspec.structs.fields(struct)}
        for key, value in values.items():
            if key not in fields:
                near = get_close_matches(key, fields, n=1, cutoff=0.5)
                hint = f"did you mean `{prefix}{near[0]}`?" if near else f"known here: {', '.join(fields)}"
                raise self._error(f"{prefix}{key}", f"unknown key; {hint}", is_value_shown=False)
            inner = fields[key]
            if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                self._check_keys(value, inner, f"{prefix}{key}.")
            elif inner == dict[str, RateOverride] and isinstance(value, Mapping):
                for name, item in value.items():
                    self._check_keys(item, RateOverride, f"{prefix}{key}.{name}.")
            elif inner == PerIp | None:
                self._check_keys(value, PerIp, f"{prefix}{key}.")
            elif inner == S3Location | None:
                self._check_keys(value, S3Location, f"{prefix}{key}.")
            elif inner == list[_Provider] and isinstance(value, list):
                for index, item in enumerate(value):
                    self._check_keys(item, _Provider, f"{prefix}{key}[{index}].")

    def _check_limits(self, table: str, limits: Limits | PerIp) -> None:
        for name in limits.__struct_fields__:
            if getattr(limits, name) < 1:
                raise self._error(f"{table}.{name}", "expected at least 1")

    def _origin(self, key: str, text: str) -> str:
        if _ORIGIN.fullmatch(text.lower()) is None:
            raise self._error(key, 'expected scheme://host[:port], as in "https://app.example"')
        return text.lower()

    def _network(self, index: int, text: str) -> IPv4Network | IPv6Network:
        try:
            return ip_network(text)
        except ValueError as cause:
            expectation = f'expected an address or a network, as in "10.0.0.0/8": {cause}'
            raise self._error(f"trusted_proxies[{index}]", expectation) from cause

    def _digests(self, digests: list[str]) -> tuple[str, ...]:
        if len(digests) > _ADMIN_KEY_COUNT_MAX:
            raise self._error("admin.key_sha256", f"expected at most {_ADMIN_KEY_COUNT_MAX}: the old key and the new")
        for index, digest in enumerate(digests):
            if re.fullmatch(r"[0-9a-fA-F]{64}", digest) is None:
                expectation = "expected 64 hexadecimal digits: the SHA-256 of the key, not the key (`engine admin-key`)"
                raise self._error(f"admin.key_sha256[{index}]", expectation)
        return tuple(digest.lower() for digest in digests)

    def _provider(self, key: str, written: _Provider, mode: Mode) -> AuthProvider:
        audience = written.audience
        keys = self._keys(key, written, mode)
        default_algorithms = (HMAC_ALGORITHM,) if isinstance(keys, SharedSecret) else DEFAULT_ALGORITHMS
        try:
            return AuthProvider(
                issuer=written.issuer,
                audiences=(audience,) if isinstance(audience, str) else tuple(audience),
                keys=keys,
                algorithms=default_algorithms if written.algorithms is None else tuple(written.algorithms),
            )
        except ConfigError as cause:  # it names the key within the provider
            raise ConfigError(f"{self._where(key)}: {key}.{cause}") from cause

    def _keys(self, provider_key: str, written: _Provider, mode: Mode) -> FixedKeys | RemoteKeys | SharedSecret:
        """The secret; or keys from an address, the JSON itself, or a file, in this order of looking."""
        key, jwks = f"{provider_key}.jwks", written.jwks
        match jwks, written.secret:
            case None, str(secret):
                return SharedSecret(secret.encode())
            case (None, None) | (_, str()):
                raise self._error(provider_key, "expected `jwks` (public keys) or `secret` (HS256), and not both")
            case str(), None if re.match(r"https?:", jwks, re.IGNORECASE):
                return self._remote_keys(key, jwks, written, mode)
        try:
            if isinstance(jwks, str):
                is_json = jwks.lstrip().startswith("{")
                key_set = parse_key_set(jwks if is_json else (self._path.parent / jwks).read_bytes())
            else:
                key_set = key_set_of(jwks)
        except (OSError, ValueError) as cause:
            raise self._error(key, f"expected an address, a file beside {CONFIG_FILE}, or a JWKS: {cause}") from cause
        if not key_set.keys:
            raise self._error(key, f"no usable public key: {'; '.join(key_set.refused) or 'it is empty'}")
        return FixedKeys(key_set)

    def _remote_keys(self, key: str, address: str, written: _Provider, mode: Mode) -> RemoteKeys:
        try:
            parts = urlsplit(address)
            is_loopback = parts.hostname in LOOPBACK_HOSTS
            is_usable = bool(parts.hostname) and parts.username is None
        except ValueError:
            is_usable = is_loopback = False
        if not is_usable:
            raise self._error(key, "expected https://host/path")
        is_local_development = mode == "development" and is_loopback
        if parts.scheme.lower() != "https" and not is_local_development:
            raise self._error(key, "expected https: whoever can change the answer can sign in as anybody")
        return RemoteKeys(address, written.jwks_private_network or is_local_development)


def _in_words_of_toml(message: str) -> str:
    words = message[:1].lower() + message[1:].replace("`", "")
    return words.replace("object missing", "missing").replace("expected object", "expected a table")


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are merged key by key; anything else is replaced whole."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            result[key] = _merged(below, value)
        else:
            result[key] = value
    return result


def _value_at(values: object, key: str) -> object:
    """What stands at `auth.providers[0].issuer`; None if nothing does."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key):
        if name and isinstance(values, Mapping):
            values = values.get(name)
        elif index and isinstance(values, list | tuple) and int(index) < len(values):
            values = values[int(index)]
        else:
            return None
    return values if key else None
