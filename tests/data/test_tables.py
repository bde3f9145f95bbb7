"""Data sets of Hugging Face's, as they lie on a disk: the same rows from each, and images from within them."""

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from PIL import Image

from bpo_fast.data.annotations import Annotation
from bpo_fast.data.mixture import read_sources
from bpo_fast.data.sources import Source

NUM_ROWS = 7
COLORS = ["red", "blue", "lime", "white", "black", "yellow", "cyan"]
COLUMNS = {"id": "key", "image": "picture", "question": "q", "answer": "a"}
TURNS = [("What color?", "It is {}."), ("Sure?", "Yes, {}.")]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    for color in COLORS:
        Image.new("RGB", (4, 4), color).save(tmp_path / f"{color}.png")
    return tmp_path


def texts(turn):
    return [tuple(text.format(color) for text in TURNS[turn]) for color in COLORS]


def plain(folder, embedded):
    """A data set of a question and an answer a row."""
    questions, answers = zip(*texts(0), strict=True)
    pictures = [f"{color}.png" for color in COLORS]
    if embedded:
        pictures = [{"bytes": (folder / name).read_bytes(), "path": name} for name in pictures]
    rows = Dataset.from_dict(
        {"key": range(NUM_ROWS), "picture": pictures, "q": questions, "a": answers, "more": pictures}
    )
    return rows.cast_column("picture", datasets.Image()) if embedded else rows


def parquet(rows, folder):
    rows.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def parquet_folder(rows, folder):
    (folder / "rows/data").mkdir(parents=True)
    for number in range(2):
        rows.shard(2, number, contiguous=True).to_parquet(folder / f"rows/data/{number}.parquet")
    return folder / "rows"


def saved(rows, folder):
    rows.save_to_disk(folder / "saved", num_shards=3)
    return folder / "saved"


def saved_splits(rows, folder):
    DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(folder / "saved")
    return folder / "saved"


def arrow(new):
    def make(rows, folder):
        table = rows.with_format("arrow")[:]
        with new(str(folder / "rows.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return folder / "rows.arrow"

    return make


FORMS = {
    "parquet": parquet,
    "a folder of parquet": parquet_folder,
    "saved": saved,
    "saved splits": saved_splits,
    "arrow stream": arrow(pa.ipc.new_stream),
    "arrow file": arrow(pa.ipc.new_file),
}


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(folder, form, embedded):
    location = FORMS[form](plain(folder, embedded), folder)
    source = Source(name="it", annotations=location, columns=COLUMNS, image_folder=None if embedded else folder)
    samples = read_sources([source]).samples
    expected = [
        Annotation(number, str(number), f"{color}.png", question, answer, source="it")
        for number, (color, (question, answer)) in enumerate(zip(COLORS, texts(0), strict=True))
    ]
    assert list(samples) == expected
    assert samples.take([5, 0, 6]) == [expected[5], expected[0], expected[6]]
    for sample, color in zip(samples, COLORS, strict=True):
        assert samples.read_image(sample).getpixel((0, 0)) == Image.new("RGB", (1, 1), color).getpixel((0, 0))
        assert samples.image_bytes(sample) == (folder / sample.image).read_bytes()
        assert samples.image_file(sample) == (None if embedded else folder / sample.image)


def as_turns(color):
    said = [text.format(color) for turn in TURNS for text in turn]
    return [
        {"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate([f"<image>{said[0]}", *said[1:]])
    ]


def as_messages(color):
    texts = [turn["value"].replace("<image>", "") for turn in as_turns(color)]
    messages = [
        {"role": ("user", "assistant")[at % 2], "content": [{"type": "text", "text": text}]}
        for at, text in enumerate(texts)
    ]
    messages[0]["content"].append({"type": "image", "text": None})
    return messages


_TURN = {"from": Value("string"), "value": Value("string")}
CONVERSATIONS = {
    "turns": (as_turns, List(_TURN)),
    "an object of lists": (lambda color: {key: [turn[key] for turn in as_turns(color)] for key in _TURN}, None),
    "messages of parts": (as_messages, None),
}


@pytest.mark.parametrize("turns", ["split", "keep"])
@pytest.mark.parametrize("form", CONVERSATIONS)
def test_conversations_are_read_in_each_of_their_forms(folder, form, turns):
    make, feature = CONVERSATIONS[form]
    rows = {"image": [[f"{color}.png"] for color in COLORS], "said": [make(color) for color in COLORS]}
    features = feature and Features({"image": List(Value("string")), "said": feature})
    Dataset.from_dict(rows, features=features).save_to_disk(folder / "saved")
    columns = {"conversations": "said"}
    source = Source(name="it", annotations=folder / "saved", columns=columns, image_folder=folder, turns=turns)
    samples = list(read_sources([source]).samples)
    if turns == "split":
        assert [(sample.question, sample.answer) for sample in samples[::2]] == texts(0)
        assert [(sample.question, sample.answer) for sample in samples[1::2]] == texts(1)
        assert [sample.id for sample in samples[:3]] == ["0", "0#2", "1"]
    else:
        assert [sample.history for sample in samples] == [(turn,) for turn in texts(0)]
        assert [(sample.question, sample.answer) for sample in samples] == texts(1)


def test_an_image_of_bytes_alone_is_named_after_its_row(folder):
    contents = [(folder / f"{color}.png").read_bytes() for color in COLORS]
    parquet(Dataset.from_dict({"image": contents, "q": ["?"] * NUM_ROWS, "a": COLORS}), folder)
    source = Source(name="it", annotations=folder / "rows.parquet", columns={"question": "q", "answer": "a"})
    samples = read_sources([source], max_samples=2).samples
    for sample in samples:
        assert sample.image == f"row {sample.record}"
        assert samples.image_bytes(sample) == contents[sample.record]
