"""`python -m server` is the `boomerang` command."""

import sys

from server.cli import main

sys.exit(main())
