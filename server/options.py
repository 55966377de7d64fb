"""Where `Settings` come from (flags, environment variables, a YAML file), and flags for any model of options."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from server.config import GROUPS, Bytes, Settings, extras, kind_of

Options = TypeVar("Options", bound=BaseModel)

ENV_PREFIX = "BOOMERANG_"
_METAVARS = {int: "INTEGER", float: "NUMBER", Path: "PATH", Bytes: "BYTES"}


class SettingsError(ValueError):
    """A setting has a value that cannot be used; the message names the setting and where it came from."""


def flag_name(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")


def flag_names(name: str, field: FieldInfo) -> list[str]:
    return [flag_name(name), *extras(field).get("aliases", ())]


def env_name(name: str) -> str:
    return ENV_PREFIX + name.upper()


# --- flags


def flags(model: type[BaseModel], groups: Sequence[str] | None = None) -> list[inspect.Parameter]:
    """A parameter for typer per field of these groups (all fields). Values stay text until the model reads them."""
    import typer

    parameters = []
    if model is Settings:
        config = typer.Option(help="YAML file whose keys are the names of the flags below (env: BOOMERANG_CONFIG)")
        parameters.append(_parameter("config", Annotated[str | None, config]))
    for name, field in model.model_fields.items():
        extra = extras(field)
        if field.exclude or (groups is not None and extra.get("group") not in groups):
            continue
        kind, names = kind_of(field), flag_names(name, field)
        if kind is bool:
            shown: Any = bool
            names = [f"{each}/--no-{each[2:]}" if not each.startswith("--no-") else each for each in names]
        else:
            shown = list[str] if get_origin(kind) is tuple else kind if get_origin(kind) is Literal else str
        option = typer.Option(
            *names,
            help=_help(field),
            rich_help_panel=GROUPS.get(extra.get("group", ""), extra.get("group")),
            show_default=False,
            metavar=extra.get("metavar") or _METAVARS.get(kind),
        )
        if field.is_required():
            parameters.append(_parameter(name, Annotated[shown, option], inspect.Parameter.empty))
        else:
            parameters.append(_parameter(name, Annotated[shown | None, option]))
    return parameters


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def read_options(model: type[Options], given: Mapping[str, Any]) -> Options:
    """The model of what was given as flags. SettingsError names the flags that cannot be used."""
    try:
        return model(**{name: value for name, value in given.items() if name in model.model_fields})
    except ValidationError as error:
        raise SettingsError(explain(error, flag_name)) from None


def explain(error: ValidationError, where: Callable[[str], str]) -> str:
    """One line per mistake; `where` says how a field was given."""
    lines = []
    for item in error.errors(include_url=False):
        if item["type"] == "extra_forbidden":
            text = f"there is no such setting{suggestion(str(item['loc'][0]), Settings.model_fields)}"
        elif item["type"] == "value_error":
            text = str(item["ctx"]["error"])
        else:
            text = f"{item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"
        lines.append(f"{where(str(item['loc'][0]))}: {text}" if item["loc"] else text)
    return "\n".join(lines)


def suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _help(field: FieldInfo) -> str:
    default = default_text(field)
    text = (field.description or "") + f" [{default}]" * bool(default)
    return text.replace("[", "(").replace("]", ")")  # what stands in square brackets rich would take for markup


def default_text(field: FieldInfo) -> str:
    """The default as help shows it."""
    value: Any = field.default
    if field.is_required() or value is None or value == () or value is False:
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if kind_of(field) == Bytes:
        for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value % size == 0:
                return f"{value // size}{unit}"
    return "yes" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


# --- settings


def load_settings(given: Mapping[str, Any] | None = None) -> Settings:
    """Merge flags, environment and the YAML file into one `Settings`. SettingsError says which value is wrong.

    `given`: values of flags by field, and under `config` the YAML file.
    """
    from pydantic_settings import BaseSettings, SettingsConfigDict, YamlConfigSettingsSource

    check_environment(os.environ)
    values: dict[str, Any] = {
        name: ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        for name, value in (given or {}).items()
        if value is not None
    }
    file = values.pop("config", None) or os.environ.get(ENV_PREFIX + "CONFIG")
    keys: dict[str, str] = {}  # of the file, by field

    class Yaml(YamlConfigSettingsSource):
        """Keys are names of flags, with dashes or underscores."""

        def __call__(self) -> dict[str, Any]:
            names = {flag: name for name, field in Settings.model_fields.items() for flag in flag_names(name, field)}
            keys.update({names.get(flag_name(key), key): key for key in map(str, self.init_kwargs)})
            return {name: self.init_kwargs[key] for name, key in keys.items()}

    class Loaded(BaseSettings, Settings):
        model_config = SettingsConfigDict(
            env_prefix=ENV_PREFIX, enable_decoding=False, validate_default=False, defer_build=False
        )

        @classmethod
        def settings_customise_sources(  # type: ignore[override]  # of the library's five, those that we read
            cls, settings_cls: Any, init_settings: Any, env_settings: Any, **_: Any
        ) -> Any:
            return init_settings, env_settings, *([Yaml(settings_cls, yaml_file=file)] if file else [])

    def where(name: str) -> str:
        if name in values:
            return flag_name(name)
        return env_name(name) if env_name(name) in os.environ else f"{file}: {keys.get(name, name)}"

    if file and not Path(file).is_file():  # which the library would pass over
        raise SettingsError(f"--config: there is no file {file}")
    try:
        return Loaded(**values)
    except ValidationError as error:
        raise SettingsError(explain(error, where)) from None
    except Exception as error:
        if not file or isinstance(error, SettingsError):
            raise
        raise SettingsError(f"--config: cannot read {file}: {error}") from None


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
    known = set(map(env_name, Settings.model_fields))
    for name in sorted(environ):
        is_link = _SERVICE_LINK.fullmatch(name) and (name not in known or "://" in environ[name])
        if is_link:
            raise SettingsError(
                f"{name}: Kubernetes sets this variable because a Service is called `boomerang`; put "
                "`enableServiceLinks: false` into the pod's spec"
            )
        if name.startswith(ENV_PREFIX) and name not in known and not _OTHERS.fullmatch(name):
            raise SettingsError(f"there is no setting {name}{suggestion(name, known)}")
