"""`python -m server` is the `boomerang` command."""

import signal
import sys


def main() -> int:
    """Run it; returns the exit status. Ctrl-C while modules are imported ends the process without a traceback."""
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background jobs ignore it
    if is_ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from server.cli import main as run

    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


if __name__ == "__main__":
    sys.exit(main())
