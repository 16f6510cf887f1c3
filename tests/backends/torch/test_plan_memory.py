"""Law 6: the planned peak memory is within a tenth of the measured one, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "train_thimble.py"


@pytest.mark.parametrize(
    "arguments",
    [
        "--rows 4 --length 256",
        pytest.param("--rows 4 --length 512 --compute fp32 --store dense", marks=pytest.mark.slow),
        pytest.param("--rows 4 --length 512 --recomputed 30", marks=pytest.mark.slow),
        pytest.param("--rows 1 --length 256 --recomputed 15 --streamed --rank 64", marks=pytest.mark.slow),
        pytest.param("--rows 2 --length 512 --compute int8 --store int8", marks=pytest.mark.slow),
        pytest.param("--rows 2 --length 512 --compute int8 --store file", marks=pytest.mark.slow),
    ],
)
def test_peak_memory_is_as_planned(arguments):
    command = [sys.executable, str(PROGRAM), "--steps", "1", *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["planned_bytes"] == pytest.approx(found["peak_bytes"], rel=0.1)
