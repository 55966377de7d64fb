"""Replicas as containers of one Compose service, through the Docker Engine API.

Runs in `deploy.autoscaler.gate`, beside the Engine's socket. Everything that the create call says comes from a
container that Compose made, field by field from the two lists below.
"""

from __future__ import annotations

import datetime
import re
import secrets
import socket
from typing import Any

import docker
import docker.errors
import requests

from deploy.autoscaler.drivers import DriverUnavailable, Replica, ReplicaStatus

__all__ = ["MANAGED_LABEL", "DockerDriver"]

MANAGED_LABEL = "io.boomerang.autoscaler"
_PROJECT = "com.docker.compose.project"
_SERVICE = "com.docker.compose.service"
_ONEOFF = "com.docker.compose.oneoff"
_CONFIG_HASH = "com.docker.compose.config-hash"
_NUMBER = "com.docker.compose.container-number"
# What `docker inspect` reports under HostConfig and the create call takes back unchanged; everything else there is
# either a default or belongs to one container only.
_HOST_CONFIG = (
    "Binds", "CapAdd", "CapDrop", "CpuPeriod", "CpuQuota", "CpuShares", "CpusetCpus", "DeviceRequests", "Devices",
    "ExtraHosts", "Init", "IpcMode", "LogConfig", "Memory", "MemorySwap", "Mounts", "NanoCpus", "NetworkMode",
    "PidsLimit", "ReadonlyRootfs", "RestartPolicy", "SecurityOpt", "ShmSize", "Tmpfs", "Ulimits",
)  # fmt: skip
_CONFIG = (
    "Cmd", "Entrypoint", "Env", "ExposedPorts", "Healthcheck", "Image", "Labels", "StopSignal", "StopTimeout", "User",
    "Volumes", "WorkingDir",
)  # fmt: skip


class DockerDriver:
    """Scales service `service` of Compose project `project` by cloning one of its containers.

    A clone carries the service's labels and network aliases, so Docker's DNS finds it as one more replica. It is
    labelled as a one-off container besides, which `docker compose up` leaves alone and `down --remove-orphans` removes;
    as an ordinary one it would be stopped, streams and all, by the next `up`. At least one container that Compose made
    must exist (stopped will do): it is the template. A clone whose template has been made anew since is `is_stale`.
    """

    def __init__(self, service: str, project: str = "", base_url: str | None = None, timeout: float = 10.0) -> None:
        """`base_url` as docker takes it (unix:///... or tcp://host:port); None: DOCKER_HOST or the local socket.

        An empty `project` means the one that the autoscaler's own container (its host name) belongs to.
        The connection is made on first use, so that a Docker that is away at start is survived like any other outage.
        """
        self.service, self.project, self.base_url, self.timeout = service, project, base_url, timeout
        self._client: docker.APIClient | None = None
        self._draining: set[str] = set()

    def replicas(self) -> list[Replica]:
        # None: gone between the two calls.
        found = [details for summary in self._containers() if (details := self._inspect(summary["Id"])) is not None]
        template = max((d for d in found if not _is_managed(d)), key=lambda d: d["Created"], default=None)
        keys_failed = template is not None and _has_keys(template) and _has_failed(template)
        replicas = [
            Replica(
                details["Id"],
                self._status(details),
                _started(details),
                is_managed=_is_managed(details),
                address=_address(details),
                is_stale=template is not None and _is_managed(details) and _origin(details) != _origin(template),
                is_open=keys_failed and not _has_keys(details),
            )
            for details in found
        ]
        self._draining &= {replica.id for replica in replicas}
        return replicas

    def start(self) -> str:
        template = self._template()
        number = 1 + max((int(c["Labels"].get(_NUMBER, 0) or 0) for c in self._containers()), default=0)
        # A random tail: two controllers, or one that restarts, never collide on a name.
        name = f"{self.project}-{self.service}-{number}-{secrets.token_hex(2)}"
        config = {key: template["Config"][key] for key in _CONFIG if template["Config"].get(key) is not None}
        config["Image"] = template["Image"]  # the image itself: its tag may have moved on since
        config["Labels"] = {
            **(config.get("Labels") or {}),
            _NUMBER: str(number),
            _ONEOFF: "True",
            MANAGED_LABEL: "true",
        }
        host = template["HostConfig"]
        config["HostConfig"] = {key: host[key] for key in _HOST_CONFIG if host.get(key)}
        config["NetworkingConfig"] = {"EndpointsConfig": _endpoints(template, self.service)}
        container = self._call("create_container_from_config", config, name=name)["Id"]
        try:
            self._call("start", container)
        except DriverUnavailable:
            self.remove(container)  # created but not startable: leave nothing behind
            raise
        return container

    def drain(self, replica_id: str) -> None:
        """SIGTERM. Docker counts a kill with the stop signal as a manual stop: the restart policy does not apply."""
        if replica_id not in self._draining:
            self._call("kill", replica_id, signal="SIGTERM", missing_ok=True)
            self._draining.add(replica_id)

    def remove(self, replica_id: str) -> None:
        self._call("remove_container", replica_id, force=True, missing_ok=True)
        self._draining.discard(replica_id)

    # --- the Engine API

    def _call(self, method: str, *args: Any, missing_ok: bool = False, **kwargs: Any) -> Any:
        try:
            if self._client is None:
                self._client = docker.APIClient(self.base_url, version="auto", timeout=self.timeout)
            return getattr(self._client, method)(*args, **kwargs)
        except docker.errors.NotFound as error:
            if missing_ok:
                return None
            raise DriverUnavailable(str(error)) from error
        except docker.errors.APIError as error:
            # 409 on kill: it has just stopped by itself; 409 on remove: removal is already in progress.
            if missing_ok and error.response is not None and error.response.status_code == 409:
                return None
            raise DriverUnavailable(str(error)) from error
        except (docker.errors.DockerException, requests.RequestException, OSError) as error:
            self._client = None  # negotiate the version again once it is back
            raise DriverUnavailable(f"{type(error).__name__}: {error}") from error

    def _containers(self) -> list[dict[str, Any]]:
        if not self.project:
            own = self._call("inspect_container", socket.gethostname())
            self.project = (own["Config"].get("Labels") or {}).get(_PROJECT, "")
            if not self.project:
                raise DriverUnavailable("not in a Compose project: name one with --project")
        labels = [f"{_PROJECT}={self.project}", f"{_SERVICE}={self.service}"]
        found = self._call("containers", all=True, filters={"label": labels})
        # `docker compose run` makes one-off containers too; those are somebody's, not replicas.
        return [c for c in found if c["Labels"].get(_ONEOFF) == "False" or MANAGED_LABEL in c["Labels"]]

    def _inspect(self, container: str) -> dict[str, Any] | None:
        return self._call("inspect_container", container, missing_ok=True)

    def _template(self) -> dict[str, Any]:
        """The youngest container of the service that Compose itself made."""
        made = [c for c in self._containers() if MANAGED_LABEL not in c["Labels"]]
        for summary in sorted(made, key=lambda c: c["Created"], reverse=True):
            if details := self._inspect(summary["Id"]):
                return details
        raise DriverUnavailable(
            f"Compose has made no container of service {self.service!r} in project {self.project!r}: none to copy"
        )

    def _status(self, details: dict[str, Any]) -> ReplicaStatus:
        state = details["State"]
        if state["Status"] in ("exited", "dead", "removing"):
            return "exited"
        if details["Id"] in self._draining:
            return "draining"
        # A container without a health check is taken as ready while it runs.
        health = (state.get("Health") or {}).get("Status", "healthy")
        if state["Status"] == "running" and health == "healthy":
            return "ready"
        is_hurt = state["Status"] == "paused" or (state["Status"] == "running" and health == "unhealthy")
        return "unhealthy" if is_hurt else "starting"


def _is_managed(details: dict[str, Any]) -> bool:
    return MANAGED_LABEL in (details["Config"].get("Labels") or {})


def _origin(details: dict[str, Any]) -> tuple[str | None, ...]:
    """What Compose made a container from: the hash of its configuration, and the image itself rather than its tag."""
    return (details["Config"].get("Labels") or {}).get(_CONFIG_HASH), details.get("Image")


def _has_keys(details: dict[str, Any]) -> bool:
    return any(re.match("BOOMERANG_API_KEY(_FILE)?=.", variable) for variable in details["Config"].get("Env") or ())


def _has_failed(details: dict[str, Any]) -> bool:
    """It was not even started (a secret is missing), or it exits and is restarted (a secret is unreadable)."""
    state = details["State"]
    is_healthy = (state.get("Health") or {}).get("Status") == "healthy"
    return not is_healthy and bool(state.get("Error") or state.get("ExitCode") or details.get("RestartCount"))


def _started(details: dict[str, Any]) -> float:
    """Docker's RFC 3339 with nanoseconds -> seconds since the epoch. Of the creation, while it was never started."""
    latest = details["State"].get("StartedAt") or ""
    whole = max(latest, details["Created"]).split(".")[0].rstrip("Z")
    return datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC).timestamp()


def _address(details: dict[str, Any]) -> str:
    networks = (details.get("NetworkSettings") or {}).get("Networks") or {}
    return next((network["IPAddress"] for network in networks.values() if network.get("IPAddress")), "")


def _endpoints(template: dict[str, Any], service: str) -> dict[str, Any]:
    """The template's networks with the service's name as alias; its own id, name and address stay its own."""
    endpoints = {}
    for name in (template.get("NetworkSettings") or {}).get("Networks") or {}:
        endpoints[name] = {"Aliases": [service]}
    return endpoints
