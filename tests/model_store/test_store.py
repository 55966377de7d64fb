"""The store: whole or absent, checked, and quick to check again."""

import json
import os
import threading

import pytest

from model_store import store
from model_store.store import MANIFEST, StoreError, folder_digest, install, model_dir, store_root, verify


@pytest.fixture(autouse=True)
def root(monkeypatch, tmp_path):
    monkeypatch.setenv("BOOMERANG_STORE", str(tmp_path))
    return tmp_path


def fill(folder):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return {"source": "here", "licence": "Apache-2.0"}


def test_where_the_store_is(monkeypatch, tmp_path):
    assert store_root() == tmp_path and store_root("/elsewhere").as_posix() == "/elsewhere"
    monkeypatch.delenv("BOOMERANG_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert store_root().as_posix() == "/cache/boomerang"
    assert model_dir("owner/name").name == "owner--name"


def test_installed_models_record_where_they_came_from():
    target = install("owner/name", fill)
    manifest = json.loads((target / MANIFEST).read_text())
    assert manifest["source"] == "here" and set(manifest["files"]) == {"config.json", "model.safetensors"}
    verify(target)


def test_a_failed_install_leaves_nothing(root):
    def broken(folder):
        fill(folder)
        raise RuntimeError("no network")

    with pytest.raises(RuntimeError):
        install("owner/name", broken)
    assert not model_dir("owner/name").exists()
    assert not [path for path in (root / "incoming").iterdir() if path.is_dir()]


def test_a_partial_download_is_kept_for_the_next_try_and_seen_by_nobody():
    seen = []

    def attempt(folder):
        seen.append(sorted(path.name for path in folder.iterdir()))
        fill(folder)
        if len(seen) == 1:
            raise OSError("connection lost")
        return {}

    with pytest.raises(OSError):
        install("owner/name", attempt, keep_partial=True)
    assert not model_dir("owner/name").exists()
    install("owner/name", attempt, keep_partial=True)
    assert seen == [[], ["config.json", "model.safetensors"]]


def test_replacing_keeps_the_old_one_until_the_new_one_is_whole():
    target = install("owner/name", fill)
    with pytest.raises(RuntimeError):
        install("owner/name", lambda folder: (_ for _ in ()).throw(RuntimeError), replace=True)
    verify(target)

    def other(folder):
        (folder / "config.json").write_text("[]")
        assert (target / "model.safetensors").exists()
        return {}

    install("owner/name", other, replace=True)
    assert (target / "config.json").read_text() == "[]" and not (target / "model.safetensors").exists()


def test_two_at_once_make_it_once():
    started, calls = threading.Barrier(2), []

    def slow(folder):
        calls.append(folder)
        return fill(folder)

    def run():
        started.wait()
        install("owner/name", slow)

    threads = [threading.Thread(target=run) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(calls) == 1


def test_damage_is_noticed():
    target = install("owner/name", fill)
    weights = target / "model.safetensors"
    weights.write_bytes(b"weighty")
    os.utime(weights, ns=(1, 1))  # of the same length, and changed on disk
    with pytest.raises(StoreError, match="does not match its recorded digest"):
        verify(target)
    weights.write_bytes(b"weigh")
    with pytest.raises(StoreError, match="5 bytes instead of 7: pull the model again"):
        verify(target)
    weights.unlink()
    with pytest.raises(StoreError, match="is missing"):
        verify(target)


def test_a_warm_check_reads_no_file(monkeypatch):
    target = install("owner/name", fill)
    reads = []
    original = store.sha256
    monkeypatch.setattr(store, "sha256", lambda path, progress=False: reads.append(path.name) or original(path))
    verify(target)
    assert reads == []
    os.utime(target / "config.json", ns=(1, 1))
    verify(target)
    verify(target)
    assert reads == ["config.json"]
    verify(target, full=True)
    assert len(reads) == 3


def test_digests_of_a_users_own_folder_are_remembered(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    fill(own)
    digest = folder_digest(own)
    assert len(digest) == 64 and sorted(path.name for path in own.iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(store, "sha256", lambda *args, **kwargs: pytest.fail("read again"))
    assert folder_digest(own) == digest
