"""Data sets of Hugging Face's, damaged: a sentence, a counted skip, or read all the same."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from bpo_fast.data.mixture import read_sources
from bpo_fast.data.sources import Source

NUM_ROWS = 4


@dataclass(frozen=True)
class Damage:
    """A fault of a saved data set of the columns id, image, question, answer, and what becomes of it.

    Attributes:
        name: of the case.
        make: changes the folder, in which the data set is saved as `rows`; or gives other rows for it.
        refused: part of the sentence that the data set is refused with.
        skipped: the cause that its first row is left out for; with neither all rows are read.
        options: of its source.
    """

    name: str
    make: Callable[[Path], list[dict] | None] = lambda folder: None
    refused: str = ""
    skipped: str = ""
    options: tuple[tuple[str, object], ...] = ()


def rows(folder):
    return [
        {"id": f"a{number}", "image": f"{number}.png", "question": f"What is {number}?", "answer": "A bus."}
        for number in range(NUM_ROWS)
    ]


def first(**changes):
    return lambda folder: [row | (changes if number == 0 else {}) for number, row in enumerate(rows(folder))]


def every(**changes):
    return lambda folder: [row | {name: make(row) for name, make in changes.items()} for row in rows(folder)]


def one_image(**changes):
    """Images as structs, the first of them changed."""
    make = every(image=lambda row: {"bytes": None, "path": row["image"]})
    return lambda folder: [row | ({"image": changes} if not number else {}) for number, row in enumerate(make(folder))]


def without(name):
    return lambda folder: [{key: value for key, value in row.items() if key != name} for row in rows(folder)]


def file_of(folder):
    (path,) = (folder / "rows").glob("*.arrow")
    return path


def to_file(change):
    return lambda folder: file_of(folder).write_bytes(change(file_of(folder).read_bytes())) and None


def splits(folder):
    DatasetDict({"test": Dataset.from_list(rows(folder))}).save_to_disk(folder / "rows.splits")
    for path in (folder / "rows").iterdir():
        path.unlink()
    (folder / "rows").rmdir()
    (folder / "rows.splits").rename(folder / "rows")


def linked_out(folder):
    (folder / "0.png").rename(folder.parent / "outside.png")
    (folder / "0.png").symlink_to(folder.parent / "outside.png")


def parquet(change):
    def make(folder):
        Dataset.from_list(rows(folder)).to_parquet(folder / "rows.parquet")
        (folder / "rows.parquet").write_bytes(change((folder / "rows.parquet").read_bytes()))

    return make


def at(name, **more):
    return (("annotations", name), *more.items())


NOT_READ = "found no data set that can be read ("
DAMAGES = [
    Damage(
        "no column of images", without("image"), "found no column 'image' among id, question, answer, expected tho"
    ),
    Damage(
        "no column of answers", without("answer"), refused="found no column 'answer' among id, image, question, exp"
    ),
    Damage(
        "columns that are not stated", refused="found no column 'conversations' among id, ", options=(("columns", {}),)
    ),
    Damage(
        "no column of ids of that name",
        refused="found no column 'key' among id, image, question, answer, expected those of",
        options=(("columns", {"id": "key", "question": "question", "answer": "answer"}),),
    ),
    Damage("nothing of that name", refused=NOT_READ, options=at("nobody/nothing")),
    Damage("no file", refused=NOT_READ, options=at("rows.parquet")),
    Damage("an empty folder", lambda folder: (folder / "rows/empty").mkdir(), NOT_READ, options=at("rows/empty")),
    Damage("another split", splits, refused=f"{NOT_READ}\"no split 'train'\")"),
    Damage("a split by name", splits, options=(("split", "test"),)),
    Damage("no Arrow file", to_file(lambda data: b""), refused=NOT_READ),
    Damage("half an Arrow file", to_file(lambda data: data[: len(data) // 2]), refused=NOT_READ),
    Damage("a web page for an Arrow file", to_file(lambda data: b"<!DOCTYPE html>" * 9), refused=NOT_READ),
    Damage("a missing shard", lambda folder: file_of(folder).unlink(), refused=NOT_READ),
    Damage("state that is no JSON", lambda folder: (folder / "rows/state.json").write_text("{") and None, NOT_READ),
    Damage(
        "bytes that are no text", to_file(lambda data: data.replace(b"A bus", b"A \xff\xfeu")), "found damage within"
    ),
    Damage("half a Parquet file", parquet(lambda data: data[: len(data) // 2]), NOT_READ, options=at("rows.parquet")),
    Damage("no bytes of Parquet", parquet(lambda data: b""), refused=NOT_READ, options=at("rows.parquet")),
    Damage(
        "no rows",
        lambda folder: Dataset.from_list(rows(folder)).select([]).save_to_disk(folder / "none"),
        NOT_READ,
        options=at("none"),
    ),
    Damage("null for a question", first(question=None), skipped="no text in 'question' and 'answer'"),
    Damage(
        "numbers for answers", every(answer=lambda row: 7), refused="found no usable record among 4 (record 0 has no"
    ),
    Damage("an empty answer", first(answer=""), skipped="response: empty"),
    Damage("an answer of 351 words", first(answer="bus " * 351), skipped="response: too_long"),
    Damage("<image> in an answer", first(answer="A <image>."), skipped="response: image_tag"),
    Damage("<image> in a question", first(question="What is it?\n<image>")),
    Damage(
        "<image> twice in a question", first(question="<image><image>"), skipped="several <image> in the first que"
    ),
    Damage("other letters", first(question="Où est l'autobus ? 🚌", id="Łódź")),
    Damage("null for an id", first(id=None)),
    Damage("no ids", without("id")),
    Damage("one id for all", every(id=lambda row: "a")),
    Damage("a row twice", lambda folder: [*rows(folder)[:1], *rows(folder)], skipped="a repeat of an earlier record"),
    Damage("a missing image", lambda folder: (folder / "0.png").unlink(), skipped="an image that does not exist"),
    Damage("null for an image", first(image=None), skipped="no 'image' path"),
    Damage("a path out of the folder", first(image="../outside.png"), skipped="an image path that cannot be followed"),
    Damage("an absolute path", first(image="/etc/hostname"), skipped="an image path that cannot be followed"),
    Damage("a link out of the folder", linked_out, skipped="an image path that cannot be followed"),
    Damage("numbers for images", every(image=lambda row: 7), refused="(record 0 has no 'image' path)"),
    Damage(
        "several images", every(image=lambda row: [row["image"]] * (1 + (row["id"] == "a0"))), skipped="no 'image'"
    ),
    Damage("an embedded image of null", one_image(bytes=None, path=None), skipped="no 'image' path"),
    Damage(
        "an embedded path out of the folder", one_image(bytes=None, path="../outside.png"), skipped="an image path t"
    ),
    Damage("a path within an embedded image", one_image(bytes=b"not read yet", path="/etc/hostname")),
    Damage(
        "no image_folder",
        refused="(record 0 has an image given by path, and no image_folder)",
        options=(("image_folder", None), *at([{"image": "0.png", "question": "What?", "answer": "A bus."}])),
    ),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.name for damage in DAMAGES])
def test_a_sentence_or_a_counted_skip(damage, tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    for number in range(NUM_ROWS):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    Dataset.from_list(rows(tmp_path)).save_to_disk("rows")
    if (changed := damage.make(tmp_path)) is not None:
        Dataset.from_list(changed).save_to_disk("rows")
    options = {
        "annotations": "rows",
        "columns": {"question": "question", "answer": "answer"},
        "image_folder": tmp_path,
    }
    source = Source(name="it", **options | dict(damage.options))
    if damage.refused:
        with pytest.raises(ValueError, match="found") as error:
            read_sources([source])
        assert damage.refused in str(error.value)
        assert "\n" not in str(error.value)
        return
    selection = read_sources([source])
    assert len(selection.samples) == NUM_ROWS - (bool(damage.skipped) and "repeat" not in damage.skipped)
    causes = [cause for _, cause in selection.skipped.counts]
    assert len(causes) == len(selection.skipped) == bool(damage.skipped)
    assert all(cause.startswith(damage.skipped) for cause in causes)
