import random

import pytest
from PIL import Image

from bpo_fast.answers.batches import answer_in_batches
from bpo_fast.data import read_image
from bpo_fast.runs.journal import Journal

QUESTIONS = list("abcde")


@pytest.fixture
def paths(tmp_path):
    """Images of five questions, the third of them damaged."""
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(768)).save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:60])
    return paths


def skip(question, error):
    return {"question": question, "skipped": str(error)}


def fill(tiny_llava, paths, folder, *, calls=None, **options):
    """Records of a journal in batches of two, whose answer is the bytes of the image."""
    model, processor = tiny_llava

    def answer(questions, images):
        assert not model.training
        if calls is not None:
            calls.append(questions)
        return [{"question": q, "answer": i.tobytes().hex()} for q, i in zip(questions, images, strict=True)]

    with Journal(folder / "journal.jsonl", 2, len(QUESTIONS)) as journal:
        answer_in_batches(model, processor, QUESTIONS, paths, journal, answer, **options)
        return journal.records


def test_each_question_has_its_record_in_order_and_a_bad_image_its_own(tiny_llava, paths, tmp_path):
    calls = []
    tiny_llava[0].train()
    records = fill(tiny_llava, paths, tmp_path, calls=calls, skip=skip)
    assert calls == [["a", "b"], ["d"], ["e"]]
    assert [record["question"] for record in records] == QUESTIONS
    for number in (0, 1, 3, 4):
        assert records[number]["answer"] == read_image(paths[number]).tobytes().hex()
    assert "2.png: found a file that cannot be decoded" in records[2]["skipped"]
    assert tiny_llava[0].training
    assert fill(tiny_llava, paths, tmp_path, calls=calls, skip=skip) == records
    assert len(calls) == 3  # nothing was asked again


def test_without_a_skip_a_bad_image_ends_the_run_after_the_batches_before_it(tiny_llava, paths, tmp_path):
    tiny_llava[0].train()
    with pytest.raises(ValueError, match=r"2\.png: found a file that cannot be decoded .*, expected an image"):
        fill(tiny_llava, paths, tmp_path)
    assert tiny_llava[0].training
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 2


def test_the_processor_is_checked_before_the_first_answer(tiny_llava, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_llava[1], "num_additional_image_tokens", 0)
    calls = []
    with pytest.raises(ValueError, match="3 image tokens"):
        fill(tiny_llava, paths, tmp_path, calls=calls, skip=skip)
    assert calls == []
