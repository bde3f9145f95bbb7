"""Tensors kept by key: whole shards or none, whatever is killed, damaged, shared or full."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import namedtuple

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bpo_fast.runs import tensor_cache
from bpo_fast.runs.tensor_cache import TensorCache

FORK = multiprocessing.get_context("fork")
SETTINGS = {"model": "a", "dtype": "float32"}
DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.float16)


def tensor(number):
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(1 + number % 5, 3, generator=generator) * 100
    return values.to(DTYPES[number % 4])


def items(count):
    return [(f"key-{number}", f"more-{number}") for number in range(count)]


class Maker:
    """Makes the tensors of items and notes which, each chunk under its own numbers."""

    def __init__(self, journal=None, seconds=0.0, stop_after=None):
        self.chunks, self.journal, self.seconds, self.stop_after = [], journal, seconds, stop_after

    def __call__(self, chunks):
        for chunk in chunks:
            if self.stop_after is not None and len(self.chunks) == self.stop_after:
                raise KeyboardInterrupt
            time.sleep(self.seconds)
            self.chunks.append(tuple(chunk))
            if self.journal is not None:
                with open(self.journal, "a") as file:
                    file.write("".join(f"{number}\n" for number in chunk))
            yield {f"{name}-{n}": tensor(n + (name == "more")) for n in chunk for name in ("key", "more")}

    @property
    def numbers(self):
        return sorted(number for chunk in self.chunks for number in chunk)


def fill(root, count, maker=None, settings=SETTINGS, report=print, **options):
    cache = TensorCache(root, "tensors", settings)
    cache.load((key for keys in items(count) for key in keys), report=report, progress=False)
    maker = maker or Maker()
    cache.fill(items(count), maker, report=report, progress=False, **options)
    return cache, maker


def check(cache, count):
    for number in range(count):
        for name, wanted in (("key", tensor(number)), ("more", tensor(number + 1))):
            found = cache[f"{name}-{number}"]
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


def shards(cache):
    return sorted(cache.folder.glob("*.safetensors"))


def test_what_was_made_once_is_read_by_all_later_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_cache, "SHARD_BYTES", 200)
    first, maker = fill(tmp_path, 20)
    check(first, 20)
    assert maker.numbers == list(range(20))
    assert len(shards(first)) > 3
    again, maker = fill(tmp_path, 20)
    check(again, 20)
    assert maker.chunks == []
    more, maker = fill(tmp_path, 30)
    check(more, 30)
    assert maker.numbers == list(range(20, 30))
    assert json.loads((first.folder / "settings.json").read_text()) == SETTINGS
    with pytest.raises(KeyError):
        first["key-25"]
    assert first.get("key-25") is None
    other = TensorCache(tmp_path, "tensors", SETTINGS | {"dtype": "bfloat16"})
    other.load(["key-1"])
    assert "key-1" not in other


def cut(share):
    return lambda data: data[: int(len(data) * share)]


def flipped(place):
    def change(data):
        at = int(place * (len(data) - 1))
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return change


@pytest.mark.parametrize(
    "damage",
    [
        *map(cut, (0, 0.01, 0.5, 0.99)),
        lambda data: data[:-1],
        *map(flipped, (0, 0.003, 0.1, 0.3, 0.9, 1)),
        lambda data: data + b"\0",
        lambda data: bytes(len(data)),
        lambda data: b"no shard",
    ],
)
def test_a_damaged_shard_is_told_and_made_again_and_never_read(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(tensor_cache, "SHARD_BYTES", 200)
    cache, _ = fill(tmp_path, 20)
    files = shards(cache)
    held = {name for name in load_file(files[1]) if name.startswith("key")}
    whole = {path: path.read_bytes() for path in files}
    files[1].write_bytes(damage(whole[files[1]]))
    told = []
    again, maker = fill(tmp_path, 20, report=told.append)
    check(again, 20)
    assert len(told) == 1
    assert told[0].startswith(f"{files[1]}: found a damaged shard (")
    assert {f"key-{number}" for number in maker.numbers} == held
    assert {path: path.read_bytes() for path in shards(again)} == whole  # the same bytes, under the same name


def test_a_shard_of_another_name_or_of_other_settings_is_not_read(tmp_path):
    cache, _ = fill(tmp_path, 3)
    (file,) = shards(cache)
    wrong = {f"{name}-{n}": torch.full_like(tensor(n), 7) for n in range(3) for name in ("key", "more")}
    other, _ = fill(tmp_path, 3, settings=SETTINGS | {"model": "b"}, maker=lambda chunks: iter([wrong] * len(chunks)))
    assert torch.equal(other["key-2"], wrong["key-2"])
    # The whole of another cache under this one's name, a shard moved in, and one with its name and this one's header.
    shutil.rmtree(cache.folder)
    shutil.copytree(other.folder, cache.folder)
    told = []
    again, maker = fill(tmp_path, 3, report=told.append)
    check(again, 3)
    assert len(maker.numbers) == 3
    assert "it belongs to a cache of other settings" in told[0]
    save_file(wrong, file, metadata={"fingerprint": cache.fingerprint})
    again, maker = fill(tmp_path, 3, report=told.append)
    check(again, 3)
    assert "its bytes have changed" in told[1]
    os.rename(file, file.with_name("0" * 64 + ".safetensors"))
    again, maker = fill(tmp_path, 3, report=told.append)
    check(again, 3)
    assert len(maker.numbers) == 3


@pytest.mark.parametrize("stop_after", [0, 1, 4, 6])
def test_a_fill_that_was_stopped_goes_on_with_the_same_chunks(tmp_path, monkeypatch, stop_after):
    monkeypatch.setattr(tensor_cache, "SHARD_BYTES", 400)
    _, whole = fill(tmp_path / "whole", 22, chunk_size=3)
    stopped = Maker(stop_after=stop_after)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "stopped", 22, stopped, chunk_size=3)
    cache, rest = fill(tmp_path / "stopped", 22, chunk_size=3)
    check(cache, 22)
    assert set(rest.chunks) <= set(whole.chunks)
    assert sorted({*rest.chunks, *stopped.chunks}) == sorted(whole.chunks)


def in_a_child(function, *arguments):
    child = FORK.Process(target=function, args=arguments)
    child.start()
    return child


def test_processes_that_fill_at_once_share_the_work(tmp_path):
    def run(number):
        fill(tmp_path, 300, Maker(tmp_path / f"made-{number}", seconds=0.002), report=lambda _: None)

    children = [in_a_child(run, number) for number in range(3)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    made = [(tmp_path / f"made-{number}").read_text().split() for number in range(3)]
    assert all(made)
    assert sorted(number for each in made for number in each) == sorted(map(str, range(300)))
    cache, maker = fill(tmp_path, 300)
    assert maker.chunks == []
    check(cache, 300)


def test_killed_at_any_moment_nothing_is_read_half_written_and_nothing_whole_is_made_again(tmp_path, monkeypatch):
    def slowly(tensors, path, metadata):
        path.write_bytes(b"half a shard")
        time.sleep(0.002)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(tensor_cache, "SHARD_BYTES", 2000)
    monkeypatch.setattr(tensor_cache, "save_file", slowly)
    rng = random.Random(0)

    def run():
        told = []
        fill(tmp_path, 300, Maker(seconds=0.0005), report=told.append, chunk_size=4)
        os._exit(1 if any("damaged" in sentence for sentence in told) else 0)

    kept = set()
    for _ in range(12):
        child = in_a_child(run)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode in (-9, 0)
        there = {path.name for path in tmp_path.glob("tensors/*/*.safetensors")}
        assert kept <= there
        kept = there
    cache, _ = fill(tmp_path, 300, chunk_size=4)
    check(cache, 300)
    assert not list(cache.folder.glob(".*.tmp"))


def test_what_a_living_process_writes_is_left_alone_and_waited_for(tmp_path, capsys):
    cache, _ = fill(tmp_path, 0)
    go = FORK.Event()

    def run():
        def make(chunks):
            (cache.folder / ".00.tmp").write_text("of a living process")
            assert go.wait(20)
            yield from Maker()(chunks)

        cache.load([key for keys in items(5) for key in keys])
        cache.fill(items(5), make, report=lambda _: None, progress=False)

    child = in_a_child(run)
    while not (cache.folder / ".00.tmp").exists():
        time.sleep(0.01)
    told = []

    def report(sentence):
        told.append(sentence)
        assert (cache.folder / ".00.tmp").exists()
        go.set()

    found, maker = fill(tmp_path, 5, report=report)
    child.join()
    check(found, 5)
    assert maker.chunks == []
    assert told == [f"{cache.folder}: found another process that makes the rest of it; waiting for it."]


def test_no_room_is_one_sentence_with_both_figures_and_nothing_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 3 * 2**30))
    with pytest.raises(
        ValueError, match=r"cache_dir: found 3.0 GiB free at .*, expected 8.0 GiB for the tensors of 4"
    ):
        fill(tmp_path / "cache", 4, num_bytes=lambda missing: len(missing) * 2**31)
    assert not (tmp_path / "cache").exists()
    told = []
    fill(tmp_path / "cache", 4, num_bytes=lambda missing: len(missing) * 2**29, report=told.append)
    assert "4 of 4 items: about 2.0 GiB in" in told[0]
    assert "where 3.0 GiB are free" in told[0]


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_full_disk_is_a_sentence_and_what_was_written_stays(tmp_path, monkeypatch, error):
    fill(tmp_path, 3)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patches:
        patches.setattr(tensor_cache, "save_file", full)
        with pytest.raises(OSError, match=r"cannot be written \(.*No space left"):
            fill(tmp_path, 9)
    cache, maker = fill(tmp_path, 9)
    check(cache, 9)
    assert maker.numbers == list(range(3, 9))
    assert not list(cache.folder.glob(".*.tmp"))


def test_a_root_that_is_no_folder_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        fill(tmp_path / "file", 3)


def test_a_cache_that_is_removed_while_it_is_read_is_a_sentence(tmp_path):
    cache, _ = fill(tmp_path, 3)
    shutil.rmtree(cache.folder)
    with pytest.raises(FileNotFoundError, match="a shard was removed"):
        cache["key-0"]


def test_a_child_opens_the_maps_itself(tmp_path):
    cache, _ = fill(tmp_path, 3)
    check(cache, 3)
    opened = dict(cache._opened)

    def run():
        check(cache, 3)
        os._exit(int(any(file is opened[name] for name, file in cache._opened.items())))

    child = in_a_child(run)
    child.join()
    assert child.exitcode == 0
