"""Every example is tried before training: what is found, how often it is looked for, and what it leaves behind."""

import json
import os
import time

import datasets
import pytest
import torch
from PIL import Image
from tiny_models import make_pairs

from bpo_fast.data import load_preference_dataset, preference_row, write_pairs
from bpo_fast.data.pairs import COLUMNS
from bpo_fast.train import check_pairs as module
from bpo_fast.train.check_pairs import BadPair, check_columns, check_pairs
from bpo_fast.train.collator import PreferenceCollator

NUM_PAIRS = 12


@pytest.fixture
def collator(processor):
    return PreferenceCollator(processor, image_token_id=processor.image_token_id, max_length=30)


@pytest.fixture
def folder(tmp_path):
    """Images 0.png to 11.png, and pairs.jsonl about them."""
    for number in range(NUM_PAIRS):
        Image.effect_noise((16, 16), 50).save(tmp_path / f"{number}.png")
    write(tmp_path)
    return tmp_path


def write(folder, **changes):
    """Writes pairs.jsonl; `changes`: row0={"chosen": ...} -> that row's differences."""
    rows = [
        preference_row(f"{n}.png", f"w{n}", f"w1 w{n}", f"w2 w{n}", id=f"id-{n}") | changes.get(f"row{n}", {})
        for n in range(NUM_PAIRS)
    ]
    write_pairs(folder / "pairs.jsonl", rows)


def load(folder):
    return load_preference_dataset(folder / "pairs.jsonl")


def assistant(text):
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


BAD = {
    1: ("answer: found an empty message of role 'assistant'", {"chosen": assistant(" ")}),
    3: ("max_length: found 30, expected more than the 35 tokens of the prompt", {"prompt": " ".join(["w1"] * 28)}),
    4: ("answer: found <image> in the text 'w1 <image>'", {"rejected": assistant("w1 <image>")}),
    6: ("chosen and rejected: found the same 3 tokens", {"rejected": assistant("w1 w6")}),
    7: ("prompt: found 1 image placeholders for 2 images", {"images": ["7.png", "0.png"]}),
}


@pytest.fixture
def bad_folder(folder):
    write(folder, **{f"row{n}": change for n, (_, change) in BAD.items()})
    cut(folder / "9.png")
    (folder / "10.png").unlink()
    return folder


EXPECTED = {n: sentence for n, (sentence, _) in BAD.items()} | {
    9: "9.png: found a file that cannot be decoded (",
    10: "10.png: found no such file, expected an image.",
}


def test_good_pairs_pass(folder, collator):
    assert check_pairs(load(folder), collator) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_bad_row_is_listed_with_its_reason(bad_folder, collator, num_workers, monkeypatch):
    dataset = load(bad_folder)
    bad = check_pairs(dataset, collator, num_workers=num_workers)
    assert [pair.number for pair in bad] == sorted(EXPECTED)
    for pair in bad:
        assert EXPECTED[pair.number] in pair.reason
        assert pair.id == f"id-{pair.number}"
    # What is left is what a training can read whole.
    left = dataset.select([n for n in range(NUM_PAIRS) if n not in EXPECTED])
    assert sum(len(collator([row])["sequences"]) for row in left) == NUM_PAIRS - len(EXPECTED)


def test_a_picture_that_is_too_large_is_a_bad_row(folder, collator, monkeypatch):
    Image.new("RGB", (200, 200)).save(folder / "5.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    (bad,) = check_pairs(load(folder), collator)
    assert bad.number == 5
    assert "5.png: found a file that cannot be decoded (Image size (40000 pixels) exceeds limit" in bad.reason


def test_a_damaged_image_of_any_data_set_is_named(folder, collator):
    """Not only of those that load_preference_dataset made: TRL's own columns with the plain Image feature."""
    rows = [
        preference_row(str(folder / f"{n}.png"), f"w{n}", "w1", "w2") | {"images": [str(folder / f"{n}.png")]}
        for n in range(3)
    ]
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    cut(folder / "1.png")
    (bad,) = check_pairs(dataset, collator)
    assert (bad.number, bad.id) == (1, None)
    assert f"{folder / '1.png'}: found a file that cannot be decoded" in bad.reason


def test_a_list_of_dicts_is_checked_too(collator):
    pairs = make_pairs(5)
    assert check_pairs(pairs, collator) == []
    pairs[2]["id"] = "half \ud83d"
    pairs[2]["prompt"] = pairs[4]["chosen"] = "half \ud83d"
    del pairs[3]["rejected"]
    bad = check_pairs(pairs, collator)
    assert [pair.number for pair in bad] == [2, 3, 4]
    assert bad[0].id == "half \\ud83d"
    assert bad[1].reason.startswith("example: found no 'rejected'")
    json.dumps([pair.reason for pair in bad], ensure_ascii=False).encode()


def test_strict_names_the_first(bad_folder, collator):
    with pytest.raises(
        ValueError, match=r"^dataset: found 7 of 12 rows .* \(row 1: .*; row 3: .*; row 4: .*\), expected n"
    ):
        check_pairs(load(bad_folder), collator, strict=True)


def test_nothing_to_train_on_is_an_error(folder, collator):
    collator.max_length = 5
    with pytest.raises(
        ValueError, match=r"^dataset: found 12 of 12 rows that cannot be trained on \(row 0: max_length: "
    ):
        check_pairs(load(folder), collator)


@pytest.fixture
def tried(monkeypatch):
    """Numbers of the rows that were tried, in this process."""
    numbers, getitem = [], module._Tried.__getitem__
    monkeypatch.setattr(module._Tried, "__getitem__", lambda self, n: (numbers.append(n), getitem(self, n))[1])
    return numbers


def test_rows_are_tried_once(bad_folder, collator, tried, tmp_path):
    cache = tmp_path / "checked.json"
    first = check_pairs(load(bad_folder), collator, cache_file=cache)
    assert tried == list(range(NUM_PAIRS))
    tried.clear()
    assert check_pairs(load(bad_folder), collator, cache_file=cache) == first
    assert tried == []
    with pytest.raises(ValueError, match="found 7 of 12 rows"):
        check_pairs(load(bad_folder), collator, cache_file=cache, strict=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder, collator: (time.sleep(0.01), Image.new("RGB", (16, 16)).save(folder / "0.png")),
        lambda folder, collator: os.utime(folder / "0.png", (1, 1)),
        lambda folder, collator: (folder / "0.png").unlink(),
        lambda folder, collator: write(folder, row11={"chosen": assistant("w9")}),
        lambda folder, collator: setattr(collator, "max_length", 31),
        lambda folder, collator: setattr(collator, "token_budget", 64),
        lambda folder, collator: setattr(collator, "responses", ("chosen",)),
        lambda folder, collator: (folder / "checked.json").write_text("{"),
        lambda folder, collator: (folder / "checked.json").write_text('{"fingerprint": 1}'),
        lambda folder, collator: (folder / "checked.json").write_text("[]"),
    ],
    ids=["image", "time", "missing", "text", "length", "budget", "responses", "cut", "old", "foreign"],
)
def test_what_changed_is_tried_again(folder, collator, tried, change):
    cache = folder / "checked.json"
    check_pairs(load(folder), collator, cache_file=cache)
    tried.clear()
    change(folder, collator)
    check_pairs(load(folder), collator, cache_file=cache)
    assert tried == list(range(NUM_PAIRS))
    assert json.loads(cache.read_text())["checked"] == NUM_PAIRS


def test_another_processor_is_another_check(folder, collator, tried, processor, monkeypatch):
    cache = folder / "checked.json"
    check_pairs(load(folder), collator, cache_file=cache)
    processor.tokenizer(["w1", "w2 w3"], padding=True)  # leaves its mark in the tokenizer, which means nothing
    tried.clear()
    check_pairs(load(folder), collator, cache_file=cache)
    assert tried == []
    monkeypatch.setattr(processor, "chat_template", processor.chat_template + " ")
    check_pairs(load(folder), collator, cache_file=cache)
    assert len(tried) == NUM_PAIRS


def test_a_killed_check_goes_on(bad_folder, collator, tried, monkeypatch):
    cache = bad_folder / "checked.json"
    expected = check_pairs(load(bad_folder), collator)
    monkeypatch.setattr(module, "_BETWEEN_WRITES", 4)
    write_json, writes = module.write_json, []

    def dying(path, value):
        write_json(path, value)
        writes.append(value["checked"])
        if len(writes) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", dying)
    with pytest.raises(KeyboardInterrupt):
        check_pairs(load(bad_folder), collator, cache_file=cache)
    assert writes == [4, 8]
    tried.clear()
    assert check_pairs(load(bad_folder), collator, cache_file=cache) == expected
    assert tried == [8, 9, 10, 11]


def test_training_draws_the_same_numbers_after_it(folder, collator):
    before = torch.get_rng_state()
    check_pairs(load(folder), collator, num_workers=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        (None, "found a NoneType, expected preference pairs; see bpo_fast.data"),
        ("pairs.json", "found a str, expected preference pairs"),
        ([], "found no examples, expected at least one"),
        (datasets.Dataset.from_list([]), "found no examples, expected at least one"),
        (
            datasets.Dataset.from_dict({"prompt": ["w1"]}),
            r"found columns \['prompt'\], expected \['chosen', 'rejected', 'im",
        ),
        (
            datasets.DatasetDict(train=datasets.Dataset.from_dict({})),
            "found a DatasetDict of train, expected one data set",
        ),
        ({"train": []}, "found a dict, expected one data set; choose a split"),
        (
            datasets.Dataset.from_dict({name: ["w1"] for name in COLUMNS}).to_iterable_dataset(),
            "found a streaming data set",
        ),
        (torch.utils.data.ChainDataset([]), "found a streaming data set, expected one of known length"),
    ],
)
def test_what_cannot_hold_pairs_is_named(dataset, sentence):
    with pytest.raises(ValueError, match=f"^train_dataset: {sentence}"):
        check_columns("train_dataset", dataset)


def test_columns_that_are_enough():
    good = datasets.Dataset.from_dict({name: ["w1"] for name in ("image", "prompt", "chosen", "id")})
    check_columns("train_dataset", good, ("chosen",))
    check_columns("train_dataset", make_pairs(1))


def test_a_bad_pair_is_plain_data():
    assert BadPair(3, None, "why") == BadPair(number=3, id=None, reason="why")
