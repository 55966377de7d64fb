"""Who may import whom: `docs/architecture.md` prints the table, the code keeps to it, imports for types included."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "model_store", "deploy")
OURS = (*PACKAGES, "benchmarks", "recipes", "studies", "tests")


def read_rule() -> dict[str, set[str]]:
    """Room -> rooms that it may import, from the rows `| rooms | imports | ...` of the printed table."""
    section = (ROOT / "docs/architecture.md").read_text().split("## Who may import whom\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    names = [[re.findall(r"`(\w+)`", cell) for cell in row] for row in rows]
    return {room: set(others) for rooms, others in names for room in rooms}


def room_of(module: str) -> str:
    """The server's packages and modules are rooms of their own; other packages are one room each."""
    first, *rest = module.split(".")
    return rest[0] if first == "server" and rest else first


def imports() -> Iterator[tuple[str, str, str]]:
    """(file and line, room, imported room) of every import between rooms."""
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            for other in {room_of(name) for name in names if name.split(".")[0] in OURS} - {room}:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", room, other


def test_imports_keep_to_the_table():
    rule = read_rule()
    broken = [f"{where}: {room} imports {other}" for where, room, other in imports() if other not in rule.get(room, ())]
    assert not broken, "\n".join(broken)


def test_the_table_is_a_house_of_floors():
    """No circle: from the ground floor up, every room imports rooms below it only."""
    rule, built = read_rule(), set()
    while built != set(rule):
        floor = {room for room, others in rule.items() if room not in built and others <= built}
        assert floor, f"a circle among {sorted(set(rule) - built)}"
        built |= floor


def test_the_scheduler_and_the_policy_need_no_torch():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for room in ("core", "sizing")
               for path in sorted((ROOT / "server" / room).glob("*.py"))]  # fmt: skip
    modules += ["server.engine.queue", "server.engine.scheduler", "server.engine.kv_cache"]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
