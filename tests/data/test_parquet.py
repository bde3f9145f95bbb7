"""Shards of pairs: the same bytes from the same rows, and read by `datasets` and TRL with no code of ours."""

import hashlib
import io
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig
from shared_run import make_samples, run
from tiny_models import make_llava

from bpo_fast.data.pairs import load_preference_dataset
from bpo_fast.data.parquet import FEATURES, write_shard


def rows(folder, count=250):
    turns = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    for number in range(count):
        image = {"bytes": None, "path": f"/images/{number}.png"}
        yield {"images": [image], "prompt": turns, "chosen": answer, "id": str(number), "seed": number - 2**62}


WRITE = """
import sys
sys.path.insert(0, sys.argv[1])
from test_parquet import rows, write_shard
print(write_shard(sys.argv[2], rows(None)).sha256)
"""


def test_the_same_rows_are_the_same_bytes_in_any_process(tmp_path):
    shard = write_shard(tmp_path / "a.parquet", rows(tmp_path))
    data = (tmp_path / "a.parquet").read_bytes()
    assert (shard.rows, shard.bytes, shard.sha256) == (250, len(data), hashlib.sha256(data).hexdigest())
    folder = str(__file__).rpartition("/")[0]
    done = subprocess.run(
        [sys.executable, "-c", WRITE, folder, str(tmp_path / "b.parquet")],
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == shard.sha256
    table = pq.read_table(tmp_path / "a.parquet")
    assert datasets.Features.from_arrow_schema(table.schema) == FEATURES
    assert table["rejected"].null_count == table["chosen_logp"].null_count == 250
    assert table["seed"].to_pylist() == [number - 2**62 for number in range(250)]


@pytest.fixture
def pairs(tmp_path):
    """The output of a run, by path and with its images inside."""
    records = make_samples(tmp_path)
    run(tmp_path, "by-path", records)
    run(tmp_path, "embedded", records, embed_images=True)
    return tmp_path


@pytest.mark.parametrize("name", ["by-path", "embedded"])
def test_plain_load_dataset_reads_what_we_read(pairs, name):
    plain = datasets.load_dataset(str(pairs / name), split="train", cache_dir=str(pairs / "cache"))
    ours = load_preference_dataset(pairs / name)
    assert plain.column_names == ours.column_names == list(FEATURES)
    without = [column for column in FEATURES if column != "images"]
    assert plain.select_columns(without).to_list() == ours.select_columns(without).to_list()
    for number, pair in enumerate(plain):
        (image,) = pair["images"]
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == (int(pair["id"]), 0, 0)
        assert image.tobytes() == ours[number]["images"][0].tobytes()
    stored = plain.cast_column("images", datasets.List(datasets.Image(decode=False)))[0]["images"][0]
    file = pairs / "images/0.png"
    assert (stored["bytes"], stored["path"]) == (
        (file.read_bytes(), "0.png") if name == "embedded" else (None, str(file))
    )


def test_images_may_move(pairs, tmp_path):
    expected = load_preference_dataset(pairs / "by-path")[3]["images"][0].tobytes()
    (pairs / "images").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"by-path: found none of its 22 images, the first is .*0\.png"):
        load_preference_dataset(pairs / "by-path")
    moved = load_preference_dataset(pairs / "by-path", image_folder=tmp_path / "moved")
    assert moved[3]["images"][0].tobytes() == expected
    assert load_preference_dataset(pairs / "embedded")[3]["images"][0].tobytes() == expected
    with pytest.raises(ValueError, match=r"image_folder: found '.*moved', expected None for '.*embedded', which hol"):
        load_preference_dataset(pairs / "embedded", image_folder=tmp_path / "moved")


def damaged(shard, change):
    data = bytearray(shard.read_bytes())
    change(data)
    shard.write_bytes(data)


def flip_a_bit_that_shows_in_the_text_alone(data):
    """Changes a byte of a shard so that reading it goes well, but for checksums, and gives other rows."""
    whole = pq.read_table(io.BytesIO(bytes(data)))
    for place in range(4, len(data)):
        data[place] ^= 1
        try:
            if not pq.read_table(io.BytesIO(bytes(data))).equals(whole):
                return
        except (OSError, pa.ArrowException, ValueError):
            pass
        data[place] ^= 1
    pytest.fail("every change was found")


def test_a_damaged_shard_is_named_and_made_again_from_its_journal(pairs):
    out = pairs / "by-path"
    shard = out / "data/part-00002-of-00005.parquet"
    other, whole = out / "data/part-00004-of-00005.parquet", shard.read_bytes()
    for change, found in [
        (lambda data: data.__delitem__(slice(-9, None)), "no Parquet file that can be read"),
        (flip_a_bit_that_shows_in_the_text_alone, "pages that cannot be read"),
        (lambda data: data.__setitem__(slice(None), other.read_bytes()), "bytes and 4 rows instead of"),
    ]:
        damaged(shard, change)
        with pytest.raises(ValueError, match=rf"00002-of-00005\.parquet: found .*{found}.*, expected the shard that"):
            load_preference_dataset(out)
        shard.unlink()
        with pytest.raises(
            ValueError, match=r"parquet: found no such file, expected the shard that the manifest lists"
        ):
            load_preference_dataset(out)
        notes = (pairs / "by-path.notes").read_text()
        run(pairs, "by-path", make_samples(pairs))
        assert (shard.read_bytes(), (pairs / "by-path.notes").read_text()) == (whole, notes)


def test_trl_takes_a_step_on_it(pairs, processor, tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl")
    dataset = datasets.load_dataset(str(pairs / "embedded"), split="train", cache_dir=str(pairs / "cache"))
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "dpo"), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        learning_rate=0.1, logging_steps=1, max_length=None, bf16=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        make_llava(), args=config, train_dataset=dataset, processing_class=processor,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    torch.testing.assert_close(loss, 0.6931, rtol=0, atol=1e-3)  # policy and reference are equal
    moved = [parameter for name, parameter in trainer.model.named_parameters() if "lora_B" in name]
    assert any(bool(parameter.any()) for parameter in moved)
