"""Mixtures: which samples are drawn, what is left out, and that a sample read again is the one that was read."""

import json
import pickle

import pytest
from PIL import Image

from bpo_fast.data.annotations import Annotation, draw, read_annotations
from bpo_fast.data.mixture import read_sources
from bpo_fast.data.sources import Source
from bpo_fast.runs.files import write_json, write_jsonl


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    return tmp_path


def record(number, *texts, image="1.png"):
    texts = texts or (f"<image>\nQuestion {number}?", f"Answer {number}.")
    turns = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]
    return {"id": str(number), "image": image, "conversations": turns}


def records(count):
    return [record(number) for number in range(count)]


def ids(samples):
    return [sample.id for sample in samples]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_draw_is_of_the_lowest_numbers_whatever_the_order_of_the_file(folder, seed):
    write_json(folder / "a.json", records(50))
    write_jsonl(folder / "b.jsonl", reversed(records(50)))
    annotations = read_annotations(folder / "a.json", folder)[0]
    lowest = sorted(annotations, key=lambda each: draw(seed, Annotation(**_fields(each), source="x")))
    for samples in (5, 20, 50, 80):
        for file in ("a.json", "b.jsonl"):
            selection = read_sources([Source(name="x", annotations=folder / file, samples=samples)], seed=seed)
            assert set(ids(selection.samples)) == set(ids(lowest[:samples]))
            assert [sample.record for sample in selection.samples] == sorted(
                sample.record for sample in selection.samples
            )


def _fields(annotation):
    return {name: getattr(annotation, name) for name in ("record", "id", "image", "question", "answer", "history")}


def test_a_mixture_cut_short_keeps_its_shares_and_grows_by_adding(folder):
    sources = [
        Source(name="many", annotations=records(300), image_folder=folder, samples=60),
        Source(name="few", annotations=records(30), image_folder=folder),
    ]
    before = set()
    for count in (3, 30, 90, 200):
        samples = read_sources(sources, seed=3, max_samples=count).samples
        found = {(sample.source, sample.id) for sample in samples}
        assert len(found) == min(count, 90)
        assert sum(source == "few" for source, _ in found) == min(count, 90) // 3
        assert before <= found
        before = found


def test_repeats_are_left_out_and_samples_of_one_id_are_not(folder):
    several = [record(1), record(1, "<image>\nOther?", "Yes."), record(1), record(1, "<image>Question 1?", "Else.")]
    selection = read_sources([Source(name="x", annotations=several, image_folder=folder)])
    assert [(sample.record, sample.question) for sample in selection.samples] == [(0, "Question 1?"), (1, "Other?")]
    assert [(skip.record, skip.id, skip.source) for skip in selection.skipped] == [(2, "1", "x"), (3, "1", "x")]
    cause = "a repeat of an earlier record: the same id, image and question"
    assert selection.report() == {
        "selected": 2,
        "sources": {"x": {"records": 4, "usable": 2, "asked": None, "selected": 2, "skipped": {cause: 2}}},
    }


def test_a_missing_image_each_is_one_cause(folder):
    missing = [record(number, image=f"{number}.jpg") for number in range(2, 5)]
    selection = read_sources([Source(name="x", annotations=[record(1), *missing], image_folder=folder)])
    assert selection.skipped.counts == {("x", "an image that does not exist"): 3}
    assert [skip.reason for skip in selection.skipped] == [
        f"image {number}.jpg does not exist" for number in (2, 3, 4)
    ]


@pytest.mark.parametrize("turns", ["first", "split", "keep"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_sample_read_again_is_the_one_that_was_read(folder, turns, encoding):
    texts = [record(n, "<image>Wo?", f"Grün {n}.", "Ça?", "😀.", "Und nun?")["conversations"] for n in range(40)]
    data = [record(number) | {"conversations": said} for number, said in enumerate(texts)]
    (folder / "a.json").write_bytes(json.dumps(data, ensure_ascii=False, indent=1).encode(encoding))
    samples = read_sources([Source(name="x", annotations=folder / "a.json", turns=turns)]).samples
    assert len(samples) == (80 if turns == "split" else 40)
    whole = list(samples)
    assert ids(whole)[:3] == (["0", "0#2", "1"] if turns == "split" else ["0", "1", "2"])
    assert [sample.answer for sample in whole][:2] == {
        "first": ["Grün 0.", "Grün 1."],
        "split": ["Grün 0.", "😀."],
        "keep": ["😀.", "😀."],
    }[turns]
    assert whole[1].history == ((("Wo?", "Grün 1."),) if turns == "keep" else ())
    assert [sample.sample_id for sample in whole] == samples.sample_ids.tolist()
    assert [len(sample.answer) for sample in whole] == samples.lengths.tolist()
    order = [7, 0, 7, 39, 3]
    assert samples.take(order) == [whole[index] for index in order]
    assert samples[-1] == whole[-1]
    assert pickle.loads(pickle.dumps(samples)).batch(3, 9) == whole[3:9] == samples[3:9]


def test_a_file_that_changes_meanwhile_is_one_sentence(folder):
    write_json(folder / "a.json", records(3))
    samples = read_sources([Source(name="x", annotations=folder / "a.json")]).samples
    write_json(folder / "a.json", [record(number, image="1.png") for number in (5, 6, 7)])
    with pytest.raises(ValueError, match=r"a\.json: found another record 1 than when it was read, expected"):
        samples[1]
