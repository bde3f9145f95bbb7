"""A run on a Ray cluster: its parts are the rows of a Ray Data pipeline, made by actors that hold the model.

Nothing but numbers of parts goes through Ray: responses go to the journals in the run's folder, which lies on a file
system that all nodes see. When a node or a worker is lost, Ray gives its part to another one, which goes on after the
last batch in the part's journal.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from bpo_fast.bootstrap.job import Job
from bpo_fast.bootstrap.parts import Part
from bpo_fast.bootstrap.progress import Progress
from bpo_fast.bootstrap.work import POLL, Worker
from bpo_fast.runs.folder import shared_folder


def make_on_cluster(job: Job, parts: Sequence[Part], progress: Progress, address: str, workers: int | None) -> None:
    """Make parts of a run on a Ray cluster.

    Args:
        job: the run, whose model is given by path.
        parts: of it.
        progress: is told of each part.
        address: of the cluster as `ray.init` takes it, "auto" for the one that this node is of; "local" starts one
            of this machine alone.
        workers: number of actors; None takes one a GPU, or one a CPU where there is no GPU.

    Raises:
        ImportError: Ray is not installed.
        ValueError: the model is loaded already, which no other process can use.
        RuntimeError: what a worker said that could not go on.
    """
    if not job.given.is_path:
        raise ValueError(
            "ray: found a loaded model, expected the path of one, which every worker loads; give its path."
        )
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        ray.init(None if address == "local" else address, log_to_driver=False, include_dashboard=False)
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = ray.data.from_items([{"part": part.number} for part in parts], override_num_blocks=len(parts))
        made = rows.map_batches(
            PartMaker,
            fn_constructor_args=(ray.put(job), os.getcwd()),
            batch_size=1,
            concurrency=min(workers or gpus or int(resources["CPU"]), len(parts)),
            num_gpus=1 if gpus else 0,
            num_cpus=0 if gpus else 1,
        )
        sizes = {part.number: part.size * len(job.makers) for part in parts}
        for row in made.iter_rows():
            if row["fault"]:
                raise RuntimeError(row["fault"])
            progress.made(sizes[int(row["part"])], 0)
    finally:
        if started:
            ray.shutdown()


class PartMaker:
    """Makes the parts whose numbers it is given, as an actor of `map_batches`.

    Args:
        job: reference of the run.
        working_dir: folder that the run's relative paths start from.
    """

    def __init__(self, job: Any, working_dir: str):
        self._reference, self._working_dir = job, working_dir
        self._job, self._worker, self._stack = None, None, ExitStack()

    def __call__(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        # A user's mistake, such as a model that does not load, is told by its own sentence and not asked for again.
        fault = ""
        try:
            self._start()
            for number in batch["part"]:
                while not self._worker.make(self._job.parts[int(number)]):
                    time.sleep(POLL)  # a process that is ending still holds it
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            fault = str(error)
        return {"part": batch["part"], "fault": [fault] * len(batch["part"])}

    def _start(self):
        if self._worker is None:
            os.chdir(self._working_dir)
            self._job = _ray().get(self._reference)
            self._stack.enter_context(shared_folder(self._job.folder, self._job.purpose))
            progress = self._stack.enter_context(Progress(0, shown=False))
            self._worker = self._stack.enter_context(Worker(self._job, progress))


def _ray():
    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError("ray: found no Ray, which runs on a cluster need; pip install 'ray[data]>=2.40'.") from None
    return ray
