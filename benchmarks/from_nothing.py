"""From a model that nobody has seen to an elastic server: seconds to the first answer and to widths, minutes to depths.

    python -m benchmarks.from_nothing
    python -m benchmarks.from_nothing --teacher gemma-3-270m  # after `boomerang pull gemma-3-270m`

The teacher is in the store already; everything else begins in an empty one. One server shows how long its first answer
takes, a second one the same with every width (nested codes are made at its start), a third one makes a student and is
otherwise left alone: the minutes are those of an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time

import httpx

from benchmarks.local_server import LocalServer
from model_store import made
from model_store.figures import read_quality
from model_store.pair import made_folder
from model_store.sources import default_teacher, resolve


def answered(server: LocalServer, size: str) -> bool:
    body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, "size": size}
    return httpx.post(server.url + "/v1/completions", json=body, timeout=60).status_code == 200


def seconds_to(flags: list[str], size: str) -> float:
    """From the start of a server's process to its first answer at this size."""
    started = time.monotonic()
    with LocalServer(flags, patience=1800) as server:
        assert answered(server, size)
        return time.monotonic() - started


def sizes_of(server: LocalServer) -> list[str]:
    return httpx.get(server.url + "/v1/models").json()["data"][0]["sizes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="[the default pair's]")
    parser.add_argument("--minutes", type=float, default=20.0, help="of making [20]")
    parser.add_argument("--keep", metavar="FOLDER", help="an empty one, for the store with the student, to evaluate it")
    arguments = parser.parse_args()
    teacher = str(resolve(arguments.teacher) if arguments.teacher else default_teacher())
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as store:
        common = ["--teacher", teacher, "--store", store]
        rows.append(("first answer", f"{seconds_to([*common, '--student', 'none'], '100%'):.1f} s"))
        dial = ["--student", "none", "--precision-dial", "on"]
        with_codes = f"{seconds_to([*common, *dial], '100%'):.1f} s"
        rows.append(("every width, codes being made", with_codes))
        rows.append(("every width, at later starts", f"{seconds_to([*common, *dial], '100%'):.1f} s"))
    with contextlib.nullcontext(arguments.keep) if arguments.keep else tempfile.TemporaryDirectory() as store:
        flags = ["--teacher", teacher, "--store", store, "--student", "make", "--make-minutes", str(arguments.minutes)]
        folder, started = made_folder(teacher, store), time.monotonic()
        version = 0
        with LocalServer(flags) as server:
            known = set(sizes_of(server))
            while True:
                time.sleep(1)
                progress, newest = made.read_progress(folder), made.newest(folder)
                for size in sizes_of(server):
                    if size not in known:
                        known.add(size)
                        rows.append((f"{size} is served", f"{(time.monotonic() - started) / 60:.1f} min"))
                if newest is not None and made.version_of(newest) > version:
                    version = made.version_of(newest)
                    quality = read_quality(newest / "quality.json")
                    kl = ", ".join(f"{size}L {quality[size]['kl']:.3f}" for size in sorted(quality, reverse=True)[1:])
                    rows.append((f"student {version}: KL {kl}", f"{(time.monotonic() - started) / 60:.1f} min"))
                if progress is not None and progress.is_done:
                    break
                assert server.process.poll() is None, "".join(server.log)
    print("| from an empty store to | after |\n|---|---|")
    for what, when in rows:
        print(f"| {what} | {when} |")


if __name__ == "__main__":
    main()
