"""What memory a server may take: limits of a container count, those of cgroup v1 as those of v2."""

import pytest

from server.loading import _available_ram

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
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {4096 * 1024} kB\n")
    (tmp_path / "proc/self/cgroup").write_text(group + "\n")
    for file, size in files.items():
        (tmp_path / "sys/fs/cgroup" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / file).write_text(f"{size * MiB}\n")
    assert _available_ram(tmp_path) == expected * MiB


def test_max_is_no_limit(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 1024 kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("5\n")
    assert _available_ram(tmp_path) == MiB
