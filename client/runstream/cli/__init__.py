"""The `runstream` command. One file per group; each imports the parts it needs when a command runs, never at start.

Exit codes, for scripts: 0 done; 1 failed; 2 wrong use; 3 not found; 4 unavailable, try again later; 5 an optional part
is not installed; 130 interrupted; 141 the reader of the output went away.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process and exit with its code."""
    from .app import run

    sys.exit(run(sys.argv[1:]))
