"""One script per client stack, each in an environment of its own; `python -m tests.clients` runs them all."""
