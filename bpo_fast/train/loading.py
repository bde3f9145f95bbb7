"""How batches reach a training: worker processes, their errors in a sentence, and the time that is waited for them."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader

_MOST_WORKERS = 4


def available_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_num_workers(on_gpu: bool) -> int:
    """Processes that prepare batches while a step computes.

    On a GPU a core for each process of a training is left to launch its kernels. On a CPU the cores compute, and a
    worker would only take turns with them.

    Args:
        on_gpu: whether the training computes on one.
    """
    if not on_gpu:
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(_MOST_WORKERS, available_cores() // processes - 1))


def by_itself(loader: DataLoader) -> DataLoader:
    """The same loader, drawing the seeds of its workers from numbers of its own.

    An epoch of a loader without would draw one of the training's random numbers, one with persistent workers only in
    its first epoch: dropout would then depend on the number of workers, and on evaluations.
    """
    getattr(loader, "base_dataloader", loader).generator = torch.Generator()
    if loader.num_workers:
        # Processes that are forked after a tokenizer ran on threads warn of it; workers run on one thread each.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return loader


@contextmanager
def in_row(number: int | None) -> Iterator[None]:
    """Say of whatever fails in the block which row of the data set it was.

    Args:
        number: of the row; None raises errors as they are.

    Raises:
        ValueError: in place of any error.
    """
    if number is None:
        yield
        return
    try:
        yield
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
    # Decoders report a broken file by nearly any error.
    except Exception as error:
        raise ValueError(
            f"row {number}: found that it cannot be read any more ({type(error).__name__}: {error}), expected it as "
            "it was when it was checked; bring its image back, and the same command resumes."
        ) from error


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Tell what ended a worker process, or was raised in one, in a sentence.

    Raises:
        ChildProcessError: a worker was killed or could not go on.
    """
    try:
        yield
    except RuntimeError as error:
        if not (found := re.match(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (.*?)\.?\s*$", str(error), re.DOTALL)):
            raise
        raise ChildProcessError(
            f"dataloader_num_workers: found that a worker process {' '.join(found[1].split())}, expected all to live "
            "as long as the training; the same command resumes, with fewer workers if memory ran out."
        ) from error
    except Exception as error:
        # What a worker raises comes with its traceback for a message.
        if not re.match("Caught .* in DataLoader worker process", str(error)):
            raise
        raise type(error)(str(error).strip().splitlines()[-1].partition(": ")[2]) from error


class Waiting:
    """The share of a training's time that it waits for batches."""

    def __init__(self):
        self._waited, self._since = 0.0, time.perf_counter()

    @contextmanager
    def waited(self) -> Iterator[None]:
        """Counts the time of the block as waiting."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def take(self) -> tuple[float, float]:
        """Seconds that were waited and that went by since this was last asked."""
        now = time.perf_counter()
        taken = (self._waited, now - self._since)
        self._waited, self._since = 0.0, now
        return taken
