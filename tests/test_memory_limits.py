"""What a server may take of a machine: limits of a container count, those of cgroup v1 as those of v2."""

import os

import pytest

from server.core.machine import available_memory, processor_quota, share_of_cores
from server.kernels.threads import available_threads

MiB = 1 << 20
GROUPS = {
    "v2, the container's own root": ({"memory.max": 1024, "memory.current": 200}, "0::/", 824),
    "v2, a group below": ({"a/b/memory.max": 512, "a/b/memory.current": 12}, "0::/a/b", 500),
    "v2, the group above is tighter": (
        {"a/memory.max": 256, "a/memory.current": 56, "a/b/memory.max": 512, "a/b/memory.current": 12}, "0::/a/b", 200),
    "v1": ({"memory/memory.limit_in_bytes": 1024, "memory/memory.usage_in_bytes": 24}, "4:memory:/docker/x", 1000),
    "v1, a group below": (
        {"memory/d/memory.limit_in_bytes": 300, "memory/d/memory.usage_in_bytes": 100}, "4:cpu,memory:/d", 200),
    "v1, no limit (a number beyond all memory)": (
        {"memory/memory.limit_in_bytes": 1 << 43, "memory/memory.usage_in_bytes": 24}, "4:memory:/", 4096),
    "no group": ({}, "", 4096),
    "used up": ({"memory.max": 100, "memory.current": 200}, "0::/", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_limits_of_containers(name, tmp_path):
    files, group, expected = GROUPS[name]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group + "\n")
    for file, size in files.items():
        (tmp_path / "sys/fs/cgroup" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / file).write_text(f"{size * MiB}\n")
    assert available_memory(root=tmp_path, machine=4096 * MiB) == expected * MiB


def test_max_is_no_limit(tmp_path):
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("5\n")
    assert available_memory(root=tmp_path, machine=MiB) == MiB


def write(root, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_replicas_share_the_machine_but_not_the_limit_of_a_container(tmp_path):
    write(tmp_path, {})
    assert available_memory(4, tmp_path, 4096 * MiB) == 1024 * MiB
    write(tmp_path, {"sys/fs/cgroup/memory.max": str(1200 * MiB), "sys/fs/cgroup/memory.current": str(300 * MiB)})
    assert available_memory(4, tmp_path, 4096 * MiB) == 900 * MiB
    assert available_memory(8, tmp_path, 4096 * MiB) == 512 * MiB


@pytest.mark.parametrize(
    ("folder", "limit", "used", "name"),
    [("", "memory.max", "memory.current", "inactive_file"),
     ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")],
)  # fmt: skip
def test_the_weights_files_in_the_page_cache_do_not_count_as_used(folder, limit, used, name, tmp_path):
    base = f"sys/fs/cgroup/{folder}"
    stat = f"anon 5\n{name} {700 * MiB}"
    write(tmp_path, {base + limit: str(1000 * MiB), base + used: str(1000 * MiB), base + "memory.stat": stat})
    assert available_memory(root=tmp_path, machine=4096 * MiB) == 700 * MiB


QUOTAS = {
    "none": ({}, "0::/", None, 8),
    "v2, none": ({"cpu.max": "max 100000"}, "0::/", None, 8),
    "v2, two and a half": ({"cpu.max": "250000 100000"}, "0::/", 2.5, 2),
    "v2, the group above is tighter": ({"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 1.5, 1),
    "v2, less than one": ({"cpu.max": "50000 100000"}, "0::/", 0.5, 1),
    "v1": ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/docker/x", 4.0, 4),
    "v1, none": ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/", None, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", QUOTAS)
def test_quotas_of_containers(name, tmp_path):
    files, group, quota, threads = QUOTAS[name]
    write(tmp_path, {"proc/self/cgroup": group} | {f"sys/fs/cgroup/{file}": text for file, text in files.items()})
    assert processor_quota(tmp_path) == quota
    assert share_of_cores(8, root=tmp_path) == threads
    assert share_of_cores(8, 3, tmp_path) == min(2, threads)
    assert share_of_cores(2, 3, tmp_path) == 1


def test_threads_are_cores_not_their_siblings_and_one_replicas_share_of_them(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr("server.kernels.threads.share_of_cores", lambda *args: share_of_cores(*args, root=tmp_path))
    for number in range(16):
        (tmp_path / f"cpu{number}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{number}/topology/thread_siblings_list").write_text(f"{number % 8},{number % 8 + 8}\n")
    assert [available_threads(replicas, tmp_path) for replicas in (1, 2, 3, 20)] == [8, 4, 2, 1]
    write(tmp_path, {"sys/fs/cgroup/cpu.max": "300000 100000"})
    assert [available_threads(replicas, tmp_path) for replicas in (1, 2, 3)] == [3, 3, 2]
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert available_threads(4, tmp_path) == 6
