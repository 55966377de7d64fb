"""Leaves a fingerprint of the default student's training text beside it, as `boomerang distill` does for its own.

    python -m recipes.fingerprint base.jsonl mixed3.jsonl ... --unknown "answers.jsonl of part 3" ...

The student is a mean of runs from before `distill` left fingerprints. With this one `boomerang evaluate` checks that a
held-out text was not trained on without the training text at hand.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from model_store.distill.data import read_documents
from model_store.evaluate.overlap import FINGERPRINT_FILE, Fingerprint
from model_store.pair import DEFAULT_PAIR_DIR


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="training text, as `boomerang distill` takes it")
    parser.add_argument("--unknown", nargs="*", default=[], help="what was trained on besides and is not at hand")
    parser.add_argument("--out", type=Path, default=DEFAULT_PAIR_DIR, help="student folder (the default pair's)")
    args = parser.parse_args(argv)
    found = Fingerprint.of(itertools.chain.from_iterable(read_documents(path) for path in args.data))
    for name in args.unknown:
        found.merge(Fingerprint.of_unknown(name))
    found.save(args.out / FINGERPRINT_FILE)


if __name__ == "__main__":
    main()
