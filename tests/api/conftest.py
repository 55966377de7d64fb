"""One pair and one server with default flags for all files that only talk to it."""

import pytest

from tests.api.tiny import QUICK, RunningServer, make_pair


@pytest.fixture(scope="package")
def pair(tmp_path_factory):
    """Teacher and student folders; whoever changes files changes a copy."""
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="package")
def plain(pair):
    """A server that serves whatever test comes along; in the end nothing of them may be left behind."""
    server = RunningServer(pair, *QUICK)
    try:
        server.wait_ready()
        yield server
    finally:
        status = server.stop()
    assert status == 0 and "pages are free" in "".join(server.log), "".join(server.log[-20:])
