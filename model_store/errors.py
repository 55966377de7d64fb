"""The base of errors whose message alone tells the user what to do. Imports nothing, so that anybody may import it."""


class BoomerangError(Exception):
    """Expected: a command prints the message without a traceback and exits with status 1."""


class PairError(BoomerangError, ValueError):
    """A teacher and a student that do not interlock, with the reason."""
