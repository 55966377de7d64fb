"""Building the native kernels: once for the same sources, by one process at a time, whole or not at all."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from server.kernels.cpu import build

# Stands in for a compiler, because one takes half a minute: says that it was called, takes its time, writes its output.
COMPILER = """#!/bin/sh
echo called >> {calls}
while [ "$1" != -o ]; do shift; done
sleep 0.3
echo "built $2" > "$2"
exit {status}
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Installs one that exits with a status; returns how often it was called."""
    calls, program = tmp_path / "calls", tmp_path / "c++"
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def install(status: int = 0):
        calls.write_text("")
        program.write_text(COMPILER.format(calls=calls, status=status))
        program.chmod(0o755)
        return lambda: len(calls.read_text().splitlines())

    return install


def test_who_comes_while_another_builds_waits_for_it(compiler):
    num_calls = compiler()
    with ThreadPoolExecutor(4) as threads:
        built = list(threads.map(build.build, ["avx2", "avx2", "avx512", "avx2"]))
    assert num_calls() == 2 and len({*built}) == 2 and all(library.is_file() for library in built)
    assert {library.parent for library in built} == {build.cache_folder()}


def test_an_installation_takes_what_was_built_before(compiler, tmp_path):
    num_calls = compiler()
    build.build("avx2")
    libraries = build.build_all(tmp_path / "wheel")
    assert num_calls() == len(build.VARIANTS) == len(libraries)
    assert {library.name for library in libraries} == {build.library_name(variant) for variant in build.VARIANTS}
    assert build.build_all(tmp_path / "wheel") == libraries and num_calls() == len(build.VARIANTS)


def test_a_cache_that_cannot_be_written_is_not_needed(compiler, tmp_path):
    num_calls = compiler()
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(build.build_all(tmp_path / "wheel")) == num_calls() == len(build.VARIANTS)


def test_a_compiler_that_fails_leaves_nothing(compiler, tmp_path):
    compiler(status=1)
    with pytest.raises(build.BuildError, match="failed"):
        build.build_all(tmp_path / "wheel")
    assert not (tmp_path / "wheel").exists() and not list(build.cache_folder().glob("*.so"))
