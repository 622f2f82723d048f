"""`ctx.settings`: what an operator sets for an app, typed by the one class that the app declares for it.

    class AppSettings(Settings):            # in schema.py, or in any module of functions/
        max_viewers: int = 10
        payment_key: Secret

A value comes from the variable `APP_MAX_VIEWERS`, else from `max_viewers` under `[app]` in `engine.toml`, else from the
default. An app that declares no class gets the table and the variables as they are, read-only.

Invariants
  1. Settings are whole: each name is declared, each value has its type, or the engine does not start (or reload).
  2. No value is ever part of a message: a setting that was given the wrong value may have been given a secret.
  3. They change only with a reload, which runs every query again: what a query read of them is never stale.
"""

import hmac
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType, ModuleType
from typing import Any, dataclass_transform

import msgspec

from engine.errors import ConfigError, RegistryError

VARIABLE_PREFIX = "APP_"


class Secret:
    """A text that is never shown: neither `str` nor `repr` nor a log line has it, only `reveal()`."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself, for whoever needs it to sign or to sign in."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(…)"

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        """In constant time, so that nobody learns a secret by guessing it letter by letter."""
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class _SettingsMeta(msgspec.StructMeta):
    def __new__(mcls, class_name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
        return super().__new__(mcls, class_name, bases, namespace, frozen=True, kw_only=True)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class Settings(msgspec.Struct, metaclass=_SettingsMeta):
    """The base of an app's settings: each field is one setting."""


class Given(msgspec.Struct, frozen=True):
    """The value of one setting as the operator gave it; found by `config.read_settings`."""

    where: str  # as messages name the place
    value: Any
    is_text: bool = False  # it was a variable

    def __repr__(self) -> str:
        return f"Given({self.where})"  # 2


def settings_of(modules: Iterable[ModuleType]) -> type[Settings] | None:
    """The one class of settings that the app's modules declare. Raises RegistryError at a second one."""
    found: type[Settings] | None = None
    for module in modules:
        for name, value in vars(module).items():
            # one that another module imports is found where it is defined
            if not isinstance(value, type) or not issubclass(value, Settings) or value.__module__ != module.__name__:
                continue
            if found is not None and value is not found:
                raise RegistryError(
                    f"{value.__module__}.{name} and {found.__module__}.{found.__name__} both declare settings. "
                    "An app has one such class: put all fields into it."
                )
            found = value
    if found is not None:
        _check_class(found)
    return found


def make_settings(declared: type[Settings] | None, given_by_name: Mapping[str, Given]) -> Any:
    """The value of `ctx.settings`. Raises ConfigError with the name, where it stands and what was expected."""
    if declared is None:
        return _frozen({name: given.value for name, given in given_by_name.items()})
    fields = {field.name: field for field in msgspec.structs.fields(declared)}
    for name, given in given_by_name.items():
        if name not in fields:
            near = get_close_matches(name, fields, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"{declared.__name__} has {', '.join(fields) or 'none'}."
            raise ConfigError(f"{given.where}: there is no setting `{name}`; {hint}")
    values = {}
    for name, field in fields.items():
        if name in given_by_name:
            values[name] = _value_of(given_by_name[name], field.type)
        elif field.required:
            raise ConfigError(
                f"the setting `{name}` is missing: expected {_name_of(field.type)}. "
                f"Set `{name}` under [app] in engine.toml, or the variable {_variable_of(name)}."
            )
    try:
        return declared(**values)
    except (ValueError, TypeError) as error:  # from its own `__post_init__`
        raise ConfigError(f"{declared.__name__} refuses its values: {error}") from error


def secret_named(settings: Any, name: str) -> str:
    """The text of the setting that a declaration names (a webhook's key). Raises ConfigError if there is none."""
    value = settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)
    text = value.reveal() if isinstance(value, Secret) else value
    if not isinstance(text, str) or not text:
        raise ConfigError(
            f"the setting `{name}` is needed and not set: expected a text. Set the variable {_variable_of(name)}."
        )
    return text


def _check_class(declared: type[Settings]) -> None:
    where = f"{declared.__module__}.{declared.__name__}"
    try:
        fields = msgspec.structs.fields(declared)
    except NameError as error:
        raise RegistryError(f"{where}: {error}. An annotation names it.") from error
    for field in fields:
        if field.name != field.name.lower():
            raise RegistryError(f"{where}.{field.name}: settings are named in snake_case, as variables have no case.")
        if field.type is Secret and isinstance(field.default, str):  # it would be shown: defaults are taken as they are
            raise RegistryError(f"{where}.{field.name}: a text is no Secret. Write Secret(…) around it.")


def _variable_of(name: str) -> str:
    return VARIABLE_PREFIX + name.upper()


def _value_of(given: Given, kind: Any) -> Any:
    """A variable's text stands for itself, for a number, a boolean or null, or it is JSON (lists and tables)."""
    try:
        return _convert(given.value, kind, given.where, is_text=given.is_text)
    except ConfigError:
        if not given.is_text:
            raise
        try:
            value = msgspec.json.decode(given.value)
        except msgspec.DecodeError:
            value = None
        if not isinstance(value, list | dict):
            raise
        return _convert(value, kind, given.where)


def _convert(value: object, kind: Any, where: str, *, is_text: bool = False) -> Any:
    try:
        return msgspec.convert(value, kind, strict=not is_text, dec_hook=_make_secret)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        if "'" in message:  # 2: a value that is none of a Literal's is quoted
            message = f"expected {_name_of(kind)}"
        raise ConfigError(f"{where}{place.rstrip('`')}: {message[:1].lower()}{message[1:]}") from None


def _make_secret(kind: type, value: object) -> Secret:
    if kind is not Secret:
        raise TypeError(f"`{kind.__name__}` is no type of a setting")
    if not isinstance(value, str):
        raise TypeError(f"Expected `str`, got `{type(value).__name__}`")
    return Secret(value)


def _name_of(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({key: _frozen(item) for key, item in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
