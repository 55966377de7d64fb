import json

import pytest

from tests.api.tiny import RunningServer, make_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("faults"))


class FaultyServer(RunningServer):
    """A server process that fails on demand: `inject(poison=77)`, `inject()` to stop it."""

    def __init__(self, pair, faults, *flags: str) -> None:
        self.faults = faults
        self.inject()
        super().__init__(pair, *flags, env={"FAULTS": str(faults)}, module="tests.faults.faulty")

    def inject(self, **faults) -> None:
        # Renamed into place: the server must never read half a file.
        scratch = self.faults.with_suffix(".new")
        scratch.write_text(json.dumps(faults))
        scratch.rename(self.faults)


@pytest.fixture(scope="module")
def enduring(pair, tmp_path_factory):
    """One faulty server for all faults that it must outlive, and then end as if nothing had been."""
    server = FaultyServer(pair, tmp_path_factory.mktemp("enduring") / "faults.json")
    try:
        server.wait_ready()
        yield server
    finally:
        server.inject()
        status = server.stop()
    assert status == 0 and "pages are free" in "".join(server.log), "".join(server.log[-20:])


@pytest.fixture
def faulty(pair, tmp_path):
    """Starts faulty servers and stops them at the end."""
    started = []

    def start(*flags: str) -> FaultyServer:
        server = FaultyServer(pair, tmp_path / "faults.json", *flags)
        started.append(server)
        server.wait_ready()
        return server

    yield start
    for server in started:
        server.inject()
        server.stop()
