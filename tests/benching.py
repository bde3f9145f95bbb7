"""What the tests of bench/ share: made-up results, a git repository's commands, running a script of bench/."""

import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1] / "bench"


def git(root, *arguments):
    result = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    return result.stdout.strip()


class Progress:
    n = 0

    def update(self, steps=1):
        self.n += steps


def run(script, *arguments, **environment):
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def group(**rows):
    return {"what": "`op`: a job", "shape": {"tokens": 2048, "V": 64}, "reference": "eager", "rows": rows}


def row(median, peak=None, **more):
    found = {"median": median, "quartiles": [0.9 * median, 1.1 * median]}
    return found | ({} if peak is None else {"peak_bytes": peak * 2**20}) | more
