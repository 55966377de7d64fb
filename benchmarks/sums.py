"""A held-out text of arithmetic, the same on every machine: what `evaluate --kind arithmetic=...` read.

python -m benchmarks.sums > sums_seed0.txt
"""

from __future__ import annotations

import random


def lines(count: int = 1200, seed: int = 0) -> list[str]:
    """Sums, differences, products and comparisons of numbers below a thousand."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        a, b, kind = rng.randint(2, 999), rng.randint(2, 999), rng.randint(0, 3)
        c, d = a % 90 + 2, b % 90 + 2
        order = "less" if a < b else "not less"
        found.append(
            [f"{a} + {b} = {a + b}", f"{a + b} - {b} = {a}", f"{c} * {d} = {c * d}", f"{a} is {order} than {b}."][kind]
        )
    return found


if __name__ == "__main__":
    print("\n".join(lines()))
