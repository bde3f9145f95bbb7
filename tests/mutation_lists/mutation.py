"""One entry of the lists."""

from dataclasses import dataclass

INTERPRETED = "tests/kernels/interpreted/kernel_checks.py"


@dataclass(frozen=True)
class Mutation:
    """In `file`, `fixed` becomes `broken`; then `test` must fail."""

    error: str
    file: str
    fixed: str
    broken: str
    test: str
