"""Takes the fix of each known error out again and sees its regression test fail: `python tests/mutations.py`.

The errors, in `mutation_lists/`, are ones that public kernels and trainers have had, and ones that users of this one
met. Each runs in a copy of the source tree, which is left alone; a test that passes without its fix ends the script
with code 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutation_lists import (
    answers,
    bootstrap,
    choice,
    cli,
    data,
    demo,
    kernels,
    losses,
    models,
    plan,
    precision,
    report,
    runs,
    servers,
    train,
)
from mutation_lists.mutation import INTERPRETED

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("bpo_fast", "kernels", "csrc", "recipes", "tests", "examples", "pyproject.toml")
MUTATIONS = [
    mutation
    for part in (
        kernels,
        precision,
        models,
        losses,
        data,
        cli,
        train,
        runs,
        plan,
        servers,
        report,
        answers,
        choice,
        demo,
        bootstrap,
    )
    for mutation in part.MUTATIONS
]


def run(mutation, tree):
    """Whether the mutation's test passes in `tree`, once with its fix and once without."""
    path = tree / mutation.file
    text = path.read_text()
    results = []
    for source in (text, text.replace(mutation.fixed, mutation.broken)):
        path.write_text(source)
        # Processes that a test starts import the changed tree, too.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
        if mutation.test.startswith(os.path.dirname(INTERPRETED)):
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.test]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        # Code 1 is a failed test and a negative one a crash, as of an address that wrapped; 2 and more: no test ran.
        if done.returncode > 1:
            raise RuntimeError(f"{mutation.test} did not run:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
        results.append(done.returncode == 0)
    path.write_text(text)
    return results


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only errors whose name holds this text")
    options = parser.parse_args(arguments)
    chosen = [mutation for mutation in MUTATIONS if options.match in mutation.error]
    if not chosen:
        parser.error(f"--match: found no error whose name holds {options.match!r}")
    width = max(len(mutation.error) for mutation in chosen)
    silent = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / name)
        for number, mutation in enumerate(chosen, start=1):
            start = time.perf_counter()
            with_fix, without = run(mutation, tree)
            good = with_fix and not without
            silent += not good
            verdict = "passes with its fix, fails without" if good else f"with fix {with_fix}, without {without}"
            seconds = time.perf_counter() - start
            print(f"[{number}/{len(chosen)}] {mutation.error:<{width}}  {verdict}  ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen)} errors, {silent} not caught")
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main())
