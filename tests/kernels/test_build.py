"""Building the native kernels: once for the same sources, by one process at a time, whole or not at all."""

import fcntl
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.kernels.cpu import build

# Stands in for a compiler, because one takes half a minute: says that it was called, takes its time, writes its output.
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo {version}; exit; fi
echo called >> {calls}
while [ "$1" != -o ]; do shift; done
sleep 0.3
echo "built $2" > "$2"
exit {status}
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Installs one that exits with a status (a shell word); returns how often it was called."""
    calls, program = tmp_path / "calls", tmp_path / "c++"
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def install(status: int | str = 0, version: int = 1):
        calls.write_text("")
        program.write_text(COMPILER.format(calls=calls, status=status, version=version))
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


def test_a_cache_that_fills_up_is_not_needed(compiler, tmp_path):
    """What is written there fails, as the compiler says."""
    num_calls = compiler(status=f'$(case "$2" in {tmp_path / "cache"}/*) echo 1;; *) echo 0;; esac)')
    libraries = build.build_all(tmp_path / "wheel")
    assert len(libraries) == len(build.VARIANTS) and num_calls() == 2 * len(build.VARIANTS)
    assert not list(build.cache_folder().glob("*.so"))


def test_a_user_without_a_home_needs_no_cache(compiler, tmp_path, monkeypatch):
    compiler()
    monkeypatch.delenv("XDG_CACHE_HOME")

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert len(build.build_all(tmp_path / "wheel")) == len(build.VARIANTS)
    with pytest.raises(OSError, match="home directory"):
        build.build("avx2")


def test_another_compiler_builds_anew(compiler, tmp_path):
    compiler(version=1)
    first = build.build("avx2")
    num_calls = compiler(version=2)
    assert build.build("avx2") != first and num_calls() == 1
    assert build.build_all(tmp_path / "wheel")[-1].name == build.library_name("avx2")  # where no compiler is asked for


def test_variants_that_fail_are_named(compiler, tmp_path, caplog):
    compiler(status='$(case "$2" in *_amx_*) echo 1;; *) echo 0;; esac)')
    assert len(build.build_all(tmp_path / "wheel")) == len(build.VARIANTS) - 1
    assert [record.args[0] for record in caplog.records if record.levelname == "WARNING"] == ["amx"]


def test_locks_that_fail_do_no_harm(compiler, monkeypatch):
    compiler()

    def refuse(file, operation):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert build.build("avx2").is_file()
    (build.cache_folder() / "avx512.lock").mkdir()  # cannot be opened, like another user's
    assert build.build("avx512").is_file()


def test_what_is_old_is_removed_when_something_is_built(compiler):
    compiler()
    unused, used, other = (build.build(variant) for variant in ("avx512", "avx2", "avx512_bf16"))
    killed, running = build.cache_folder() / "tmpkilled", build.cache_folder() / "tmprunning"
    for folder in (killed, running):
        folder.mkdir()
    month = time.time() - 40 * 86400
    for path in (unused, used, other, killed):
        os.utime(path, (month, month))
    build.build("avx2")
    compiler(version=2)
    new = [build.build("avx512"), build.build("avx2")]
    assert sorted(build.cache_folder().glob("*.so")) == sorted([*new, used, other])
    assert list(build.cache_folder().glob("tmp*")) == [running]


def test_a_compiler_that_fails_leaves_nothing(compiler, tmp_path):
    compiler(status=1)
    with pytest.raises(build.BuildError, match="failed"):
        build.build_all(tmp_path / "wheel")
    assert not (tmp_path / "wheel").exists() and not list(build.cache_folder().glob("*.so"))


RUNNABLE = [variant for variant in build.VARIANTS if not build.missing_instructions(variant)]


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("variant", RUNNABLE)
def test_what_this_machine_can_run_compiles(variant):
    """Tests that need the kernels are skipped where there are none: sources that do not compile would go unseen."""
    assert build.build(variant).is_file()
