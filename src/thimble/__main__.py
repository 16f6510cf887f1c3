"""The command `thimble`, and `python -m thimble`: Ctrl-C ends them quietly even while the command line is loaded."""

import signal
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Load the command line and run it; exit codes are those of `thimble.cli.main`."""
    try:
        from thimble.cli import run
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    run()


if __name__ == "__main__":
    run()
