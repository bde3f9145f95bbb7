"""Results of a benchmark: one JSON form, written from a clean tree only, kept as they come so that a run can go on.

{"bench": "kernels", "environment": {...}, "settings": {...}, "groups": {title: group}}
group: {"what": text, "shape": {name: size}, "reference": name of a row, "rows": {name: row}}
row:   {"seconds": [...], "median", "quartiles", "min", "max", "peak_bytes", "time_ratio", "peak_ratio",
        "floor_ratio", ...} or {"missing": why}; ratios are over the reference's and the floor's
"""

import json
import os
import platform
import re
import subprocess
import time
from importlib.metadata import distributions
from pathlib import Path

import charts
import report
import torch
from tqdm import tqdm

from bpo_fast.runs.files import write_json

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "flash-attn", "liger-kernel")
PACKAGES += ("cut-cross-entropy", "numpy")
# What benchmarks write: changes there do not make the next benchmark's tree unclean.
WRITTEN = ("bench/results/", "docs/benchmarks.md", "README.md")


def tree_state(repository):
    """(commit, first path with uncommitted changes or None); (None, None) outside a git repository.

    A copy of a clean tree that has no repository with it may say its commit in BPO_FAST_COMMIT.
    """
    git, options = ["git", "-C", repository], {"capture_output": True, "text": True}
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
    status = subprocess.run([*git, "status", "--porcelain", "-uall", "--no-renames"], **options).stdout
    paths = [line[3:].strip('"') for line in status.splitlines()]
    changed = next((path for path in paths if not path.startswith(WRITTEN)), None)
    return commit or os.environ.get("BPO_FAST_COMMIT"), changed


def environment(device, commit):
    """What a figure depends on: device, processor, threads, load, package versions and commit."""
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = {found.name.replace("_", "-"): found.version for found in distributions()}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": next(iter(models), platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: versions[name] for name in PACKAGES if name in versions},
        "commit": commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def identity(result):
    """What must be equal for a run to go on where an earlier one was killed."""
    found = result["environment"]
    return result["settings"], [found[key] for key in ("device", "cpu", "threads", "versions", "commit")]


def slug(device):
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower())


class Results:
    """The groups of one run and the file they go to: `output`, or bench/results/<name>-<device>.json.

    BPO_FAST_RESULTS is the folder instead of bench/results, where it is set.

    `obstacle`, found before anything is measured, says why they are not kept, or is None.
    """

    def __init__(self, bench, settings, output=None, suffix="", repository=REPOSITORY):
        commit, changed = tree_state(repository)
        found = environment(settings["device"], f"{commit}-dirty" if changed else commit)
        result = {"bench": bench, "environment": found, "settings": settings, "groups": {}}
        self.result = json.loads(json.dumps(result, default=str))  # tuples are lists, keys and paths are strings
        kept = repository / "bench/results"
        folder = Path(os.environ.get("BPO_FAST_RESULTS") or kept)
        self.path = Path(output or folder / f"{bench}-{slug(found['device'])}{suffix}.json").resolve()
        self.partial = self.path.with_suffix(".partial.json")
        self.obstacle = None
        if self.path.is_relative_to(kept.resolve()) and (changed or not commit):
            what = f"uncommitted changes ({changed})" if changed else "no git repository"
            remedy = "commit them, or give --output a path outside bench/results for a trial."
            self.obstacle = f"bench/results: found {what}, expected a clean tree, so nothing is kept; {remedy}"
            print(self.obstacle, flush=True)
        elif self.partial.exists():
            earlier = json.loads(self.partial.read_text())
            self.result["groups"] = earlier["groups"] if identity(earlier) == identity(self.result) else {}

    def run(self, jobs):
        """Keep, print and return what `jobs`, title -> (most steps of the bar, job(progress) -> group), measure."""
        groups = self.result["groups"]
        todo = {title: job for title, job in jobs.items() if title not in groups}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tqdm(total=sum(steps for steps, _ in todo.values()), unit="step", mininterval=1) as progress:
            for title, (steps, job) in todo.items():
                progress.set_description(title)
                end = progress.n + steps
                groups[title] = job(progress)
                progress.update(max(0, end - progress.n))  # a candidate that cannot run here takes fewer
                if not self.obstacle:
                    write_json(self.partial, self.result)
        self.result["groups"] = {title: groups[title] for title in jobs}
        print(f"{report.text(self.result)}\n\n{report.caption(self.result)}\n{self.obstacle or self.path}")
        if not self.obstacle:
            write_json(self.path, self.result)
            self.partial.unlink(missing_ok=True)
            charts.draw(self.path.with_suffix(".png"), self.result)
        return self.result
