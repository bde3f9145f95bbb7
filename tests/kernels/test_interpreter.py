import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("checks", ["kernel_checks.py", "elementwise_checks.py"])
def test_every_kernel_under_the_interpreter(checks):
    # A process of its own: Triton reads TRITON_INTERPRET when it is imported, and other tests import it without.
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, str(TESTS / "kernels" / "interpreted" / checks)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]
    assert re.search(r"\d\d passed", result.stdout)
    assert "skipped" not in result.stdout
