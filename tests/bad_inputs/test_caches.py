"""Bad places and states of the caches of a training: a sentence, and nothing lost."""

import shutil
from collections import namedtuple

from bad_input import Bad, check, table

from bpo_fast.cli import main as cli

BOTH = "train --cache_image_features true --precompute_ref_log_probs true --cache_dir cache"


def shards(world):
    return sorted((world / "cache").glob("*/*/*.safetensors"))


def after_training(change):
    """A `prepare` that trains with both caches, makes a change to every shard, and leaves only the caches."""

    def prepare(world):
        command, *options = BOTH.split()
        assert cli.main([command, "--config", "run.yaml", "--output_dir", "first", *options]) == 0
        for path in shards(world):
            change(path)

    return prepare


def bytes_changed(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@table(
    Bad(
        "a cache folder that is a file",
        lambda world: (world / "cache").write_text(""),
        BOTH,
        "found that it cannot be written (",
        left=("run.json",),
    ),
    Bad(
        "a cache folder and nothing to keep there",
        lambda world: None,
        "train --cache_dir cache",
        "cache_dir: found 'cache' and nothing to cache, expected None; set precompute_ref_log_probs or cache_image_fe",
    ),
    Bad(
        "log-probs of a reference that the loss does not read",
        lambda world: None,
        "train --precompute_ref_log_probs true --loss_type simpo",
        "precompute_ref_log_probs: found True with loss_type ['simpo'], expected False, since it reads no reference",
    ),
    Bad(
        "log-probs of a reference for sft",
        lambda world: None,
        "train --precompute_ref_log_probs true --loss_type sft",
        "precompute_ref_log_probs: found True with loss_type ['sft'], expected False, since it reads no reference",
    ),
    Bad(
        "shards of which a bit changed",
        after_training(bytes_changed),
        BOTH,
        "found a damaged shard (its bytes have changed), expected the bytes that were written; it is removed and made",
        left=None,
        status=0,
    ),
)
def test_a_sentence_and_no_stack_trace(bad, world, capsys):
    check(bad, world, capsys)
    if bad.status == 0:
        adapters = [(world / folder / "adapter_model.safetensors").read_bytes() for folder in ("first", "out")]
        assert adapters[0] == adapters[1]


def test_too_little_room_is_told_with_both_figures_and_nothing_is_written(world, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 100))
    sentence = "cache_dir: found 1 KiB free at "
    check(Bad("", lambda world: None, BOTH, sentence, left=("run.json",)), world, capsys)
    assert not (world / "cache").exists()
