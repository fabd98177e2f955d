"""kill -9 at random instants: nothing that a call returned from is lost, nothing is invented, nothing comes twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "bench" / "kill_journal.py"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
def test_forty_kills(seed: int) -> None:
    """The benchmark in small; `bench/kill_journal.py --kills 200` is the large one."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--kills", "20", "--seed", str(seed), "--max-seconds", "0.15"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    total = json.loads(done.stdout)
    assert (total["kills"], total["lost"], total["invented"], total["twice"], total["wrong"]) == (20, 0, 0, 0, 0)
    assert total["points"] > 20 * 100 and total["left_in_journal"] > 0
