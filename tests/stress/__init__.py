"""`make stress`: what a run and its files must survive, tried many times over; prints a line for each and its count.

Each trial is small, so that there can be many: a tiny base, a few steps, files of some kilobytes.
"""

from dataclasses import dataclass
from pathlib import Path

TINY = Path(__file__).parent.parent / "fixtures" / "gguf" / "smollm2.gguf"


@dataclass
class Line:
    """One line of the table.

    Attributes:
        name: What was tried.
        tried: How often.
        wrong: How often it went wrong.
        seconds: What it took.
        note: More to say.
    """

    name: str
    tried: int
    wrong: int
    seconds: float
    note: str = ""
