"""Tensors on disk by key, made at first use: shards that are whole or not there, shared between runs and processes."""

import fcntl
import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from bpo_fast.runs.files import write_json, writing
from bpo_fast.runs.fingerprint import fingerprint

# What is waiting is written when it is so large, or was waiting so long: a kill loses no more than that.
SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 30.0
# Locks of a cache; a key belongs to one by its hash.
_UNITS = 64
# Items that are worth a part of the work of their own.
_PART_ITEMS = 64
_POLL_SECONDS = 0.2
# A tensor's place in the header of a shard.
ENTRY_BYTES = 150

Make = Callable[[list[list[int]]], Iterator[dict[str, torch.Tensor]]]


class TensorCache:
    """Tensors under `root/name/`, in a folder of their own for each set of `settings`.

    A shard is a safetensors file whose name is the SHA-256 of its bytes and whose header has the fingerprint of the
    settings: one that was cut off, changed, renamed or copied from elsewhere does not fit and is made again, never
    read. It takes its name only when all its bytes are on disk, so a kill leaves whole shards; the next `fill` makes
    what is missing. Processes that fill at once, ranks of one run or runs of their own, share the work by locks,
    which the system frees when one of them dies.

    Tensors are read through memory maps, which every process opens for itself.

    Args:
        root: folder of all caches; made when the first shard is written.
        name: what the tensors are, e.g. "image_features"; part of messages.
        settings: all that the tensors depend on beside their keys, as JSON values.

    Example:

    >>> import tempfile
    >>> cache = TensorCache(tempfile.mkdtemp(), "squares", {"power": 2})
    >>> def make(chunks):
    ...     for chunk in chunks:
    ...         yield {str(number): torch.tensor([number**2]) for number in chunk}
    >>> cache.load(map(str, range(5)))
    >>> cache.fill([(str(number),) for number in range(5)], make, progress=False)
    >>> cache["3"]
    tensor([9])
    """

    def __init__(self, root: str | os.PathLike, name: str, settings: dict[str, Any]):
        self.name, self.settings = name, settings
        self.fingerprint = fingerprint([name, settings])
        self.folder = Path(root, name, self.fingerprint.removeprefix("sha256:")[:32])
        self._wanted: set[str] = set()
        self._shard_of: dict[str, str] = {}
        self._looked_at: set[str] = set()
        self._opened: dict[str, Any] = {}
        self._opened_by: int | None = None

    def __getstate__(self):
        return self.__dict__ | {"_opened": {}}

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def __getitem__(self, key: str) -> torch.Tensor:
        """The tensor of a key that was loaded or made, as a view of the file.

        Raises:
            KeyError: it is not there.
            FileNotFoundError: the cache was removed meanwhile.
        """
        shard = self._shard_of[key]
        if self._opened_by != os.getpid():
            self._opened, self._opened_by = {}, os.getpid()
        if shard not in self._opened:
            self._opened[shard] = self._open(shard)
        return self._opened[shard].get_tensor(key)

    def get(self, key: str) -> torch.Tensor | None:
        """The tensor of a key, or None."""
        return self[key] if key in self._shard_of else None

    def _open(self, shard):
        try:
            return safe_open(self.folder / shard, framework="pt")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.folder}: found that a shard was removed, expected it until the run has ended; give the same "
                "command again, which makes it anew."
            ) from None

    def load(
        self,
        keys: Iterable[str],
        *,
        verify: bool = True,
        report: Callable[[str], object] = print,
        progress: bool = True,
    ) -> None:
        """Find the shards that hold `keys`; those that are damaged are told, removed and not used.

        Args:
            keys: all that will be asked for, or made by `fill`.
            verify: compare the bytes of each shard with its checksum. One process of a machine has to.
            report: called with a sentence for each damaged shard.
            progress: show a bar while checksums are computed.
        """
        self._wanted = set(keys)
        self._shard_of, self._looked_at, self._opened = {}, set(), {}
        self._look(verify, report, progress)

    def _look(self, verify=False, report=print, progress=False):
        """Read the headers of the shards that were not looked at yet."""
        holds, damaged = {}, {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._looked_at:
                continue
            self._looked_at.add(path.name)
            try:
                with safe_open(path, framework="pt") as file:
                    metadata, keys = file.metadata() or {}, set(file.keys())
            except FileNotFoundError:
                continue  # another process removed it as damaged
            except (OSError, SafetensorError) as error:
                damaged[path] = str(error)
                continue
            if metadata.get("fingerprint") != self.fingerprint:
                damaged[path] = "it belongs to a cache of other settings"
            elif keys & self._wanted:
                holds[path] = keys & self._wanted
        if verify and holds:
            damaged |= self._unlike_their_names(list(holds), progress)
        for path, reason in damaged.items():
            report(
                f"{path}: found a damaged shard ({reason.rstrip('.')}), expected the bytes that were written; it is "
                "removed and made again."
            )
            self._remove(path)
        for path, keys in holds.items():
            if path not in damaged:
                for key in keys:
                    self._shard_of.setdefault(key, path.name)

    def _unlike_their_names(self, paths, progress):
        total = sum(path.stat().st_size for path in paths)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"verifying {self.name}", disable=not progress)
        damaged = {}
        with bar, ThreadPoolExecutor(4) as threads:  # hashing frees the interpreter's lock
            for path, checksum in zip(paths, threads.map(_checksum, paths), strict=True):
                if checksum != path.stem:
                    damaged[path] = "its bytes have changed"
                bar.update(path.stat().st_size)
        return damaged

    def _remove(self, path):
        try:
            with self._commit_lock():
                # One that was made again meanwhile has the same name if it has the same bytes.
                if path.exists() and _checksum(path) == path.stem and self._is_ours(path):
                    self._looked_at.discard(path.name)
                else:
                    path.unlink(missing_ok=True)
        except OSError:
            pass  # not ours to write in; it is not used

    def _is_ours(self, path):
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("fingerprint") == self.fingerprint

    def fill(
        self,
        items: Sequence[tuple[str, ...]],
        make: Make,
        *,
        chunk_size: int = 1,
        num_bytes: Callable[[list[int]], int] | None = None,
        unit: str = "item",
        report: Callable[[str], object] = print,
        progress: bool = True,
    ) -> None:
        """Make what is missing; it returns when every key of `items` is on disk, whoever made it.

        Which items are made together depends on `items` and what was there at first, not on kills or on who makes
        them: a fill that was killed and goes on makes the same tensors.

        Args:
            items: tuples of keys that are made together; the first key of each is its own.
            make: gets chunks of numbers of items, and yields for each chunk the tensors of those items by key. What is
                there already is not written twice.
            chunk_size: most items of a chunk.
            num_bytes: forecast of the tensors' size for a list of items that are missing; None checks no room.
            unit: an item, for the progress bar.
            report: called with sentences: the forecast, and that another process is waited for.
            progress: show a bar.

        Raises:
            ValueError: the forecast is more than what is free on the disk; nothing was written.
            OSError: the folder cannot be written.
        """
        missing = [number for number, keys in enumerate(items) if self._misses(keys)]
        if not missing:
            return
        if num_bytes is not None:
            self._check_room(num_bytes(missing), len(missing), len(items), unit, report)
        with writing(self.folder, self.folder / "locks", *self.folder.parents):
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        self._tidy()
        bar = tqdm(total=len(items), unit=unit, desc=f"caching {self.name}", disable=not progress)
        waiting, said = _parts(items), False
        with bar:
            while waiting:
                self._show(bar, items)
                left = []
                for part in waiting:
                    with self._claim(part.units) as claimed:
                        if claimed:
                            self._look()  # what others have made since
                            self._make_part(part, items, make, chunk_size, bar)
                        else:
                            left.append(part)
                if len(left) == len(waiting):
                    self._look()
                    left = [part for part in left if any(self._misses(items[number]) for number in part.members)]
                    if left and not said:
                        said = True
                        report(f"{self.folder}: found another process that makes the rest of it; waiting for it.")
                    if left:
                        time.sleep(_POLL_SECONDS)
                waiting = left
            self._show(bar, items)

    def _misses(self, keys):
        return any(key not in self._shard_of for key in keys)

    def _show(self, bar, items):
        bar.n = sum(not self._misses(keys) for keys in items)
        bar.refresh()

    def _check_room(self, need, num_missing, total, unit, report):
        there = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if need > free:
            raise ValueError(
                f"cache_dir: found {size(free)} free at '{there}', expected {size(need)} for the {self.name} of "
                f"{num_missing:,} {unit}s; make room, or choose another cache_dir."
            )
        report(
            f"caching the {self.name} of {num_missing:,} of {total:,} {unit}s: about {size(need)} in {self.folder}, "
            f"where {size(free)} are free"
        )

    def _make_part(self, part, items, make, chunk_size, bar):
        # Whole chunks are made in a fixed order, so after a kill those that are left are what they would have been.
        missing = [number for number in part.members if self._misses(items[number])]
        chunks = [missing[start : start + chunk_size] for start in range(0, len(missing), chunk_size)]
        temporary = self.folder / f".{part.units[0]:02}.tmp"
        pending: dict[str, torch.Tensor] = {}
        num_bytes, began = 0, time.monotonic()
        for chunk, tensors in zip(chunks, make(chunks), strict=True):
            keys = dict.fromkeys(key for number in chunk for key in items[number] if key not in self._shard_of)
            made = {key: tensors[key].detach().cpu().contiguous() for key in keys}
            bar.update(len(chunk))
            pending |= made
            num_bytes += sum(tensor.nbytes for tensor in made.values())
            if num_bytes >= SHARD_BYTES or time.monotonic() - began >= SHARD_SECONDS:
                self._write(pending, temporary)
                pending, num_bytes, began = {}, 0, time.monotonic()
        if pending:
            self._write(pending, temporary)

    def _write(self, tensors, temporary):
        try:
            with writing(self.folder, temporary):
                save_file(tensors, temporary, metadata={"fingerprint": self.fingerprint})
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                name = f"{_checksum(temporary)}.safetensors"
                with self._commit_lock():
                    os.replace(temporary, self.folder / name)
        except SafetensorError as error:  # a full disk, too
            raise OSError(
                f"{self.folder}: found that a shard cannot be written ({error}), expected room and permission for it; "
                "see to that and give the same command again, which makes the rest, or choose another cache_dir."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        self._looked_at.add(name)
        self._shard_of |= dict.fromkeys(tensors, name)

    def _tidy(self):
        """Say what the cache is of, and remove what killed processes left half-written; living ones hold a lock."""
        with self._commit_lock():
            for path in self.folder.glob(".settings.json.*.tmp"):
                path.unlink(missing_ok=True)
            write_json(self.folder / "settings.json", self.settings)
        for path in self.folder.glob(".[0-9][0-9].tmp"):
            with self._claim([int(path.stem[1:])]) as claimed:
                if claimed:
                    path.unlink(missing_ok=True)

    @contextmanager
    def _claim(self, units: Sequence[int]) -> Iterator[bool]:
        """Hold the locks of `units`, or say that another process has one of them."""
        with ExitStack() as stack:
            for unit in units:
                if not self._lock(stack, f"{unit:02}", fcntl.LOCK_NB):
                    stack.close()
                    yield False
                    return
            yield True

    @contextmanager
    def _commit_lock(self) -> Iterator[None]:
        """Held for a moment, while a shard takes its name or is removed."""
        with ExitStack() as stack:
            self._lock(stack, "commit")
            yield

    def _lock(self, stack, name, how=0):
        path = self.folder / "locks" / name
        with writing(self.folder, path):
            file = stack.enter_context(path.open("ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | how)
            except BlockingIOError:
                return False
        return True


@dataclass(frozen=True)
class _Part:
    """A part of the work: the locks that stand for it, and numbers of its items."""

    units: range
    members: list[int]


def _parts(items: Sequence[tuple[str, ...]]) -> list[_Part]:
    # A power of two: parts of fills of other sizes lie in one another, and their locks with them.
    count = 1
    while count < _UNITS and count * _PART_ITEMS < len(items):
        count *= 2
    members: list[list[int]] = [[] for _ in range(count)]
    for number in sorted(range(len(items)), key=lambda number: items[number][0]):
        members[zlib.crc32(items[number][0].encode()) % _UNITS * count // _UNITS].append(number)
    width = _UNITS // count
    return [_Part(range(n * width, (n + 1) * width), members[n]) for n in range(count) if members[n]]


def size(num_bytes: int) -> str:
    """A number of bytes for a reader.

    >>> size(300), size(5 * 2**20), size(18 * 2**30)
    ('1 KiB', '5.0 MiB', '18.0 GiB')
    """
    if num_bytes < 2**20:
        return f"{-(-num_bytes // 1024)} KiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:,.1f} GiB"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
