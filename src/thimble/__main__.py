"""`python -m thimble` is `thimble`."""

from thimble.cli import run

run()
