"""API keys: who may call, and as which tenant."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.config import Settings
from server.options import SettingsError
from server.sizing.spec import SizeSpec
from server.sizing.tenants import Tenants, tenant_from_config


@dataclass(frozen=True, slots=True)
class Key:
    """What a key stands for: limits on its calls (None: the server's own), and what `server.sizing.tenants` reads."""

    name: str
    max_concurrent: int | None = None
    max_requests_per_minute: int | None = None
    max_sequences_per_minute: int | None = None
    max_tokens_per_minute: int | None = None
    sizing: Mapping[str, Any] = field(default_factory=dict)


ANONYMOUS = Key("")


class KeyRing:
    """The accepted keys, kept as digests. No keys at all means that everybody may call."""

    def __init__(self, tenants: dict[str, Key]) -> None:
        self._entries = [(_digest(key), tenant) for key, tenant in tenants.items()]

    @classmethod
    def from_settings(cls, settings: Settings) -> KeyRing:
        """Keys of `--api-key` (one tenant each) and of `--api-key-file`. SettingsError if the file is unusable."""
        entries = [(key, Key(tenant_name(key))) for key in settings.api_key]
        if settings.api_key_file:
            found = read_key_file(Path(settings.api_key_file))
            if not found:
                raise SettingsError(f"--api-key-file: {settings.api_key_file} holds no key")
            entries += found
        tenants: dict[str, Key] = {}
        by_name: dict[str, Key] = {}
        for key, tenant in entries:
            if by_name.setdefault(tenant.name, tenant) != tenant:  # limits are kept by tenant: which would apply?
                raise SettingsError(f"the API keys of the tenant {tenant.name!r} do not say the same of it")
            if key in tenants:
                # Which of the two would apply? The key itself stays out of the log.
                raise SettingsError(f"an API key is given twice, for {tenants[key].name!r} and for {tenant.name!r}")
            tenants[key] = tenant
        return cls(tenants)

    def take(self, other: KeyRing) -> None:
        """Be `other` from now on, all keys at once."""
        self._entries = other._entries

    @property
    def is_open(self) -> bool:
        return not self._entries

    @property
    def tenants(self) -> list[Key]:
        return [tenant for _, tenant in self._entries]

    def sizing(self, resolve_size: Callable[[Any], int]) -> Tenants:
        """Bounds, budgets and shares by tenant. `resolve_size` turns "24L", "75%"... into layers."""
        return Tenants([tenant_from_config({"tenant": t.name, **t.sizing}, resolve_size) for t in self.tenants])

    def find(self, key: str) -> Key | None:
        """The tenant of a key. Every entry is compared in constant time, whatever matches."""
        digest, found = _digest(key), None
        for known, tenant in self._entries:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def tenant_name(key: str) -> str:
    """The tenant of a key that names none. Not its place in the file: that changes when another key is revoked."""
    return "key-" + _digest(key).hex()[:8]


def read_key_file(path: Path) -> list[tuple[str, Key]]:
    """One key per line (`#` starts a comment), or for .yaml/.yml/.json a list of {key, tenant, min_size, ...}."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--api-key-file: cannot read {path}: {error}") from None
    if path.suffix not in (".yaml", ".yml", ".json"):
        lines = [line.split("#")[0].strip() for line in text.splitlines()]
        return [(key, Key(tenant_name(key))) for key in lines if key]
    import yaml

    try:
        entries = yaml.safe_load(text) or []
    except yaml.YAMLError as error:
        raise SettingsError(f"--api-key-file: {path}: {error}") from None
    if not isinstance(entries, list):
        raise SettingsError(f"--api-key-file: {path} is not a list of keys")
    return [_tenant(path, index, entry) for index, entry in enumerate(entries)]


def _tenant(path: Path, index: int, entry: Any) -> tuple[str, Key]:
    if isinstance(entry, str) and entry.strip():
        return entry, Key(tenant_name(entry))
    try:
        fields = dict(entry)
        key = fields.pop("key")
        if not isinstance(key, str) or not key.strip():
            raise ValueError("key must be text")
        name = str(fields.pop("tenant", None) or tenant_name(key))
        limits = {limit: _whole(limit, fields.pop(limit, None)) for limit in _LIMITS}
        tenant_from_config({"tenant": name, **fields}, _check_size)
        return key, Key(name, **limits, sizing=fields)
    except (TypeError, ValueError, KeyError) as error:
        raise SettingsError(f"--api-key-file: {path}: entry {index}: {error}") from None


_LIMITS = ("max_concurrent", "max_requests_per_minute", "max_sequences_per_minute", "max_tokens_per_minute")


def _whole(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be a whole number from 1, not {value!r}")
    return value


def _check_size(value: Any) -> int:
    """Before the pair is loaded a size can only be read; whether it is served turns out later."""
    SizeSpec.parse(value)
    return 0
