"""Flags, environment variables and YAML keys for `Settings`, generated from its fields."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any

from server.config import GROUPS, Settings, setting_fields

ENV_PREFIX = "BOOMERANG_"

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter] = _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power


class SettingsError(ValueError):
    """A setting has a value that cannot be used; the message names the setting and where it came from."""


def parse_bytes(text: str | int) -> int:
    """`2GiB`, `512M` (binary), `1GB` (decimal), `4096` -> bytes. ValueError otherwise."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a number of bytes (like 2GiB, 512MiB or 1000000)")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_bool(value: str | bool) -> bool:
    if isinstance(value, bool):
        return value
    lowered = value.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(f"{value!r} is not true or false")


def _parse_list(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, Sequence):
        raise ValueError(f"{value!r} is not a list")
    return tuple(str(item).strip() for item in value if str(item).strip())


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _parse_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def _parse_float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "bool": parse_bool,
    "bytes": parse_bytes,
    "list": _parse_list,
    "int": _parse_int,
    "float": _parse_float,
    "str": str,
}


def convert(item: Field, value: Any, source: str) -> Any:
    """Parse and check one raw value from a flag, the environment or YAML; SettingsError names `source`."""
    metadata = item.metadata
    if metadata.get("guards") and value is not None and not any(map(str.strip, map(str, _as_list(value)))):
        # Taken as "none", it would open the server without a word.
        raise SettingsError(f"{source}: given, but empty")
    if value is None or (value == "" and item.default is None):
        return item.default
    try:
        parsed = _PARSERS[metadata["kind"]](value)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{source}: {error}") from None
    if metadata["choices"] and parsed not in metadata["choices"]:
        raise SettingsError(f"{source}: {parsed!r} is not one of {', '.join(metadata['choices'])}")
    low, high = metadata.get("minimum"), metadata.get("maximum")
    if (low is not None and parsed < low) or (high is not None and parsed > high):
        raise SettingsError(f"{source}: {parsed} is out of range ({low} .. {high if high is not None else ''})")
    return parsed


def flag_name(item: Field) -> str:
    return "--" + item.name.replace("_", "-")


def env_name(item: Field) -> str:
    return ENV_PREFIX + item.name.upper()


def default_text(item: Field) -> str:
    """The default as help and documentation show it."""
    value: Any = item.default
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        return ",".join(value)
    if item.metadata["kind"] == "bytes":
        for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value % size == 0:
                return f"{value // size}{unit}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def add_arguments(parser: argparse.ArgumentParser, groups: Sequence[str] = tuple(GROUPS)) -> None:
    """Add `--config` and a flag for every field of the given groups. Values stay raw until `load_settings`."""
    parser.add_argument("--config", metavar="FILE", help="YAML file whose keys are the flag names below")
    for group in groups:
        section = parser.add_argument_group(GROUPS[group])
        for item in setting_fields():
            if item.metadata["group"] == group:
                _add_argument(section, item)


def _add_argument(section: argparse._ArgumentGroup, item: Field) -> None:
    metadata = item.metadata
    default = default_text(item)
    text = f"{metadata['help']} [env: {env_name(item)}]" + (f" [default: {default}]" if default else "")
    text = text.replace("%", "%%")
    names = (flag_name(item), *metadata.get("aliases", ()))
    if metadata["kind"] == "bool":
        section.add_argument(*names, dest=item.name, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif metadata["kind"] == "list":
        section.add_argument(*names, dest=item.name, action="append", nargs="+", metavar="VALUE", help=text)
    else:
        metavar = "|".join(metadata["choices"]) or metadata["kind"].upper()
        section.add_argument(*names, dest=item.name, default=None, metavar=metavar, help=text)


def load_settings(
    arguments: argparse.Namespace | Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Merge flags, environment and the YAML file into one `Settings`. SettingsError says which value is wrong."""
    environ = os.environ if environ is None else environ
    flags = vars(arguments) if isinstance(arguments, argparse.Namespace) else dict(arguments or {})
    config_file = flags.get("config") or environ.get(ENV_PREFIX + "CONFIG")
    from_file = read_yaml(config_file) if config_file else {}
    check_environment(environ)
    values: dict[str, Any] = {}
    for item in setting_fields():
        if flags.get(item.name) is not None:
            value = flags[item.name]
            if item.metadata["kind"] == "list":  # argparse hands over a list of lists
                value = [part for entry in value for part in ([entry] if isinstance(entry, str) else entry)]
                value = [piece for part in value for piece in str(part).split(",")]
            values[item.name] = convert(item, value, flag_name(item))
        elif env_name(item) in environ:
            values[item.name] = convert(item, environ[env_name(item)], env_name(item))
        elif item.name in from_file:
            values[item.name] = convert(item, from_file[item.name], f"{config_file}: {item.name}")
    settings = Settings(**values)
    if bool(settings.ssl_keyfile) != bool(settings.ssl_certfile):
        raise SettingsError("--ssl-keyfile and --ssl-certfile are needed together")
    return settings


# Variables that start like a setting and are read by something else: the compose file, HAProxy, the autoscaler and its
# gate, the kernels' build, the tests.
_OTHERS = re.compile(
    r"BOOMERANG_(CONFIG|CPU_VARIANT|BACKEND|BIND|RESOLVER|SLOTS|STATS_BIND|CHECK_PORT|GPU|GPU_1|IMAGE|VERSION|SECRETS|PEERS"
    r"|(MIN_|MAX_)?REPLICAS|PUBLISH(_[A-Z]+)?|FAULT_REPORT|(AUTOSCALER|GATE|TEST|FUZZ)_[A-Z0-9_]+)"
)
# What Kubernetes sets in every pod for a Service called `boomerang`.
_SERVICE_LINK = re.compile(r"BOOMERANG_(SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)|PORT(_[0-9]+_(TCP|UDP)(_[A-Z]+)?)?)")


def check_environment(environ: Mapping[str, str]) -> None:
    """SettingsError for a BOOMERANG_* variable that nobody reads: a misspelt setting must not pass silently."""
    known = {env_name(item) for item in setting_fields()}
    for name in sorted(environ):
        is_link = _SERVICE_LINK.fullmatch(name) and (name not in known or "://" in environ[name])
        if is_link:
            raise SettingsError(
                f"{name}: Kubernetes sets this variable because a Service is called `boomerang`; put "
                "`enableServiceLinks: false` into the pod's spec"
            )
        if name.startswith(ENV_PREFIX) and name not in known and not _OTHERS.fullmatch(name):
            close = difflib.get_close_matches(name, known, 1)
            raise SettingsError(f"there is no setting {name}" + (f"; did you mean {close[0]}?" if close else ""))


def read_yaml(path: str) -> dict[str, Any]:
    """Keys are flag names with dashes or underscores. An unknown key is an error: a typo must not pass silently."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--config: cannot read {path}: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config: {path} is not a mapping of settings")
    names = {item.name for item in setting_fields()}
    names_of_aliases = {
        alias.lstrip("-").replace("-", "_"): item.name
        for item in setting_fields()
        for alias in item.metadata.get("aliases", ())
    }
    result = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = names_of_aliases.get(name, name)
        if name not in names:
            raise SettingsError(f"--config: {path}: there is no setting {key!r}")
        result[name] = value
    return result
