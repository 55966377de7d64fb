"""`python -m server` is the `boomerang` command."""

import os
import signal
import sys


def main() -> int:
    """Run it; returns the exit status. Ctrl-C while modules are imported ends the process without a traceback."""
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background jobs ignore it
    if is_ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # numpy's OpenBLAS keeps a thread for each core, which spins for 100 ms after every product. Ours are tiny.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from server.cli import main as run

    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


if __name__ == "__main__":
    sys.exit(main())
