"""`engine.toml`: what it sets, and what it says when it is wrong."""

import json
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from engine.auth.admin import digest_of
from engine.auth.providers import FixedKeys, RemoteKeys, SharedSecret
from engine.config import Config, _File, load_config
from engine.errors import ConfigError
from engine.limits import Limits, PerIp
from engine.storage.s3 import S3Location
from tests.auth.issuers import jwks

SECRET = "a secret of thirty-two bytes or more"
PROVIDER = '[[auth.providers]]\nissuer = "https://i.example"\naudience = "app"\n'


def load(tmp_path: Path, text: str, **overrides: Any) -> Config:
    (tmp_path / "engine.toml").write_text(text)
    return load_config(tmp_path, overrides)


def refusal(tmp_path: Path, text: str, **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **overrides)
    return str(caught.value).removeprefix(f"{tmp_path}/")


def test_without_a_file_all_is_default_and_safe(tmp_path: Path) -> None:
    config = load_config(tmp_path)
    assert config == Config()
    assert (config.mode, config.host, config.port, config.limits) == ("production", "127.0.0.1", 3210, Limits())
    assert not config.is_public


def test_a_file_sets_what_it_names(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        f"""
        mode = "development"
        host = "0.0.0.0"
        port = 8080
        allowed_origins = ["https://App.example", "http://localhost:5173"]
        limits.run_ms_max = 2_000
        [[auth.providers]]
        issuer = "https://i.example"
        audience = ["app", "phone"]
        jwks = "https://i.example/jwks.json"
        algorithms = ["RS256"]
        [admin]
        key_sha256 = ["{digest_of("key").upper()}"]
        """,
    )
    assert (config.mode, config.host, config.port, config.is_public) == ("development", "0.0.0.0", 8080, True)
    assert config.allowed_origins == ("https://app.example", "http://localhost:5173")
    assert config.limits == Limits(run_ms_max=2_000)
    (provider,) = config.providers
    assert (provider.issuer, provider.audiences) == ("https://i.example", ("app", "phone"))
    assert provider.keys == RemoteKeys("https://i.example/jwks.json", is_private_network_allowed=False)
    assert provider.algorithms == ("RS256",)
    assert config.admin_key_digests == (digest_of("key"),)


def test_options_stand_over_the_file_key_by_key(tmp_path: Path) -> None:
    text = "port = 1\nhost = 'localhost'\n[limits]\nrun_ms_max = 1\nrun_slow_ms = 2"
    config = load(tmp_path, text, port=2, limits={"run_ms_max": 3})
    assert (config.port, config.host, config.limits.run_ms_max, config.limits.run_slow_ms) == (2, "localhost", 3, 2)


@pytest.mark.parametrize("name", Limits.__struct_fields__)
def test_each_limit_is_set_by_its_name_and_checked(tmp_path: Path, name: str) -> None:
    assert getattr(load(tmp_path, f"limits.{name} = 7").limits, name) == 7
    assert refusal(tmp_path, f"limits.{name} = 0") == f"engine.toml: limits.{name} = 0: expected at least 1"


@pytest.mark.parametrize("name", PerIp.__struct_fields__)
def test_each_bound_of_an_address_is_set_by_its_name_and_checked(tmp_path: Path, name: str) -> None:
    assert getattr(load(tmp_path, f"[per_ip]\n{name} = 7\n").per_ip, name) == 7
    assert refusal(tmp_path, f"[per_ip]\n{name} = 0\n") == f"engine.toml: per_ip.{name} = 0: expected at least 1"


def test_addresses_are_bounded_only_if_the_file_says_so(tmp_path: Path) -> None:
    assert load(tmp_path, "").per_ip is None
    assert load(tmp_path, "[per_ip]\n").per_ip == PerIp()
    assert "did you mean `per_ip.connection_count_max`" in refusal(tmp_path, "[per_ip]\nconnection_count = 7\n")


@pytest.mark.parametrize("form", ["file", "table", "text"])
def test_keys_stand_in_a_file_or_in_the_configuration(tmp_path: Path, form: str) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "jwks.json").write_text(json.dumps(jwks("ES256")))
    entry = jwks("ES256")["keys"][0]
    written = {
        "file": '"keys/jwks.json"',
        "table": "{keys = [{" + ", ".join(f"{name} = {json.dumps(value)}" for name, value in entry.items()) + "}]}",
        "text": f"'{json.dumps(jwks('ES256'))}'",
    }
    (provider,) = load(tmp_path, f"{PROVIDER}jwks = {written[form]}").providers
    assert isinstance(provider.keys, FixedKeys)
    assert [key.kid for key in provider.keys.key_set.keys] == ["ES256"]
    assert provider.algorithms == ("RS256", "ES256", "EdDSA")


def test_a_secret_means_hs256_and_is_never_shown(tmp_path: Path) -> None:
    config = load(tmp_path, f'{PROVIDER}secret = "{SECRET}"')
    assert config.providers[0].keys == SharedSecret(SECRET.encode())
    assert config.providers[0].algorithms == ("HS256",)
    assert SECRET not in repr(config)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_plain_http_is_for_keys_on_this_machine_while_developing(tmp_path: Path, host: str) -> None:
    text = f'{PROVIDER}jwks = "http://{host}:8000/jwks.json"'
    (provider,) = load(tmp_path, text, mode="development").providers
    assert provider.keys == RemoteKeys(f"http://{host}:8000/jwks.json", is_private_network_allowed=True)
    assert "expected https" in refusal(tmp_path, text, mode="production")
    assert "expected https" in refusal(tmp_path, f'{PROVIDER}jwks = "http://i.example/x"', mode="development")


def test_keys_inside_a_private_network_are_asked_for_on_purpose(tmp_path: Path) -> None:
    text = f'{PROVIDER}jwks = "https://login.intern/jwks.json"\njwks_private_network = true'
    assert load(tmp_path, text).providers[0].keys == RemoteKeys("https://login.intern/jwks.json", True)


def test_files_go_where_it_says_and_clients_find_them_where_it_says(tmp_path: Path) -> None:
    config = load(tmp_path, "public_url = 'https://API.example/'\nstorage.bucket = 'b'\nstorage.prefix = 'live/'")
    assert (config.public_url, config.storage) == ("https://api.example", S3Location(bucket="b", prefix="live/"))


def test_trusted_proxies_are_addresses_or_networks(tmp_path: Path) -> None:
    config = load(tmp_path, "trusted_proxies = ['10.0.0.0/8', '127.0.0.1', 'fd00::/8']")
    assert config.trusted_proxies == tuple(map(ip_network, ("10.0.0.0/8", "127.0.0.1/32", "fd00::/8")))
    for wrong in ("proxy.example", "10.0.0.1/8", ""):
        problem = refusal(tmp_path, f"trusted_proxies = ['::1', '{wrong}']")
        assert problem.startswith(f"engine.toml: trusted_proxies[1] = '{wrong}': expected an address or a network")


def test_the_settings_of_the_app_are_not_its_business(tmp_path: Path) -> None:
    assert load(tmp_path, "app.anything = 1") == Config()


WRONG = {
    "prt = 1": "engine.toml: prt: unknown key; did you mean `port`?",
    "xyzzy = 1": f"engine.toml: xyzzy: unknown key; known here: {', '.join(_File.__struct_fields__)}",
    "app = 'hidden'": "engine.toml: app: expected a table, got str",
    "storage.bukket = 'b'": "engine.toml: storage.bukket: unknown key; did you mean `storage.bucket`?",
    "storage.region = 'r'": "engine.toml: storage: missing required field bucket",
    "public_url = 'api.example'": (
        "engine.toml: public_url = 'api.example': expected scheme://host[:port], as in \"https://app.example\""
    ),
    "[limits]\nrun_max_ms = 1": "engine.toml: limits.run_max_ms: unknown key; did you mean `limits.run_ms_max`?",
    "[[auth.provider]]": "engine.toml: auth.provider: unknown key; did you mean `auth.providers`?",
    '[[auth.providers]]\nisuer = "x"': (
        "engine.toml: auth.providers[0].isuer: unknown key; did you mean `auth.providers[0].issuer`?"
    ),
    "limits = 3": "engine.toml: limits = 3: expected a table, got int",
    "limits.run_ms_max = '1'": "engine.toml: limits.run_ms_max = '1': expected int, got str",
    "limits.run_ms_max = 1.5": "engine.toml: limits.run_ms_max = 1.5: expected int, got float",
    "mode = 'debug'": "engine.toml: mode = 'debug': expected development or production",
    "host = ''": "engine.toml: host = '': expected a host name or an address",
    "port = 70000": "engine.toml: port = 70000: expected 0 to 65535; 0 takes any free port",
    "port = = 1": "engine.toml: Invalid value (at line 1, column 8)",
    "[[auth.providers]]\nissuer = 'x'": "engine.toml: auth.providers[0]: missing required field audience",
    PROVIDER: "engine.toml: auth.providers[0]: expected `jwks` (public keys) or `secret` (HS256), and not both",
    f"{PROVIDER}jwks = 'x'\nsecret = '{SECRET}'": (
        "engine.toml: auth.providers[0]: expected `jwks` (public keys) or `secret` (HS256), and not both"
    ),
    f"{PROVIDER}secret = 'x'": "engine.toml: auth.providers[0].secret = (1 bytes): expected at least 32 random bytes",
    f"{PROVIDER}jwks = {{keys = []}}": "engine.toml: auth.providers[0].jwks: no usable public key: it is empty",
    f"{PROVIDER}jwks = 'https://'": "engine.toml: auth.providers[0].jwks = 'https://': expected https://host/path",
    f"{PROVIDER}jwks = 'https://a:b@i.example'": (
        "engine.toml: auth.providers[0].jwks = 'https://a:b@i.example': expected https://host/path"
    ),
    f"{PROVIDER}jwks = {{keys = [{{kty = 'oct', k = 'c2VjcmV0', kid = 'a'}}]}}": (
        "engine.toml: auth.providers[0].jwks: no usable public key: "
        "key 'a': it is secret; publish the public half and replace this key"
    ),
    f"{PROVIDER}jwks = {{}}": (
        "engine.toml: auth.providers[0].jwks: expected an address, a file beside engine.toml, or a JWKS: "
        'not a JWKS: expected {"keys": [...]}'
    ),
    "admin.key_sha256 = ['adm_secret']": (
        "engine.toml: admin.key_sha256[0]: "
        "expected 64 hexadecimal digits: the SHA-256 of the key, not the key (`engine admin-key`)"
    ),
    "admin.key_sha256 = 'adm_secret'": "engine.toml: admin.key_sha256: expected array, got str",
    f"admin.key_sha256 = {[digest_of(key) for key in 'abc']}": (
        "engine.toml: admin.key_sha256: expected at most 2: the old key and the new"
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=WRONG.values())
def test_what_is_wrong_is_told_with_file_key_value_and_expectation(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == message


def test_a_key_file_that_is_not_there_is_told_with_its_path(tmp_path: Path) -> None:
    message = refusal(tmp_path, f"{PROVIDER}jwks = 'jwks.json'")
    assert "auth.providers[0].jwks = 'jwks.json'" in message
    assert f"No such file or directory: '{tmp_path}/jwks.json'" in message


def test_a_wrong_option_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    assert refusal(tmp_path, "port = 1", port="x") == "options: port = 'x': expected int, got str"
    assert refusal(tmp_path, "", prt=1) == "options: prt: unknown key; did you mean `port`?"


@pytest.mark.parametrize(
    "origin",
    "* null app.example https:// https://*.example https://a.example/ https://u@a.example https://a.example:x "
    "ftp://a.example https://a.example? https://a.example#f http://[ https://äpp.example".split(),
)
def test_an_origin_is_scheme_host_and_port_exactly(tmp_path: Path, origin: str) -> None:
    assert "expected scheme://host[:port]" in refusal(tmp_path, f'allowed_origins = ["{origin}"]')


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "engine.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"engine\.toml"):
        load_config(tmp_path)
