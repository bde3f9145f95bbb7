import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from bpo_fast.answers import generate as generate_module
from bpo_fast.evaluate import evaluate, generate_answers
from bpo_fast.evaluate.chair import score_chair
from bpo_fast.evaluate.pope import score_pope
from bpo_fast.evaluate.run import SCORERS, Scorer

TABLE = {"w3": ["w3", "w30"], "w5": ["w5"], "w7": ["w7"]}


@pytest.fixture
def questions(tmp_path):
    """Five questions about five images: (records, image folder)."""
    torch.manual_seed(0)
    records = []
    for index in range(5):
        pixels = torch.randint(0, 255, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        record = {"id": str(index), "image": f"{index}.png", "question": " ".join(["w1"] * (index + 1))}
        records.append(record | {"objects": ["w3"], "label": "yes" if index % 2 else "no"})
    return records, tmp_path


def ask(tiny_llava, records, folder, file, **options):
    model, processor = tiny_llava
    options = {"max_new_tokens": 6, "batch_size": 2} | options
    return generate_answers(model, processor, records, image_folder=folder, answers_file=file, **options)


def test_answers_are_greedy_generation_of_each_question_alone(tiny_llava, questions, tmp_path):
    model, processor = tiny_llava
    records, folder = questions
    found = ask(tiny_llava, records, folder, tmp_path / "answers.jsonl")
    for record, answer in zip(records, found, strict=True):
        with Image.open(folder / record["image"]) as image:
            prompt = f"<s> USER: <image> {record['question']} ASSISTANT: "
            inputs = processor(
                text=[prompt], images=[image.convert("RGB")], add_special_tokens=False, return_tensors="pt"
            )
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert lines == [{"id": record["id"], "answer": answer} for record, answer in zip(records, found, strict=True)]


def test_killed_run_goes_on_and_ends_the_same(tiny_llava, questions, tmp_path, monkeypatch):
    records, folder = questions
    whole = ask(tiny_llava, records, folder, tmp_path / "whole.jsonl")
    calls, generate = [], generate_module.generate

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(generate_module, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        ask(tiny_llava, records, folder, tmp_path / "cut.jsonl")
    assert len((tmp_path / "cut.jsonl").read_text().splitlines()) == 2
    assert ask(tiny_llava, records, folder, tmp_path / "cut.jsonl") == whole
    assert len(calls) == 2 + 2  # the first batch was not asked again


def test_model_comes_back_in_the_mode_it_was_in(tiny_llava, questions, tmp_path):
    tiny_llava[0].train()
    ask(tiny_llava, *questions, tmp_path / "answers.jsonl")
    assert tiny_llava[0].training


def test_answers_to_other_questions_are_refused(tiny_llava, questions, tmp_path):
    records, folder = questions
    ask(tiny_llava, records, folder, tmp_path / "answers.jsonl")
    others = [record | {"id": f"other-{record['id']}"} for record in records]
    with pytest.raises(
        ValueError, match=r"answers\.jsonl, record 0: found the answer to '0', expected that to 'other-0'"
    ):
        ask(tiny_llava, others, folder, tmp_path / "answers.jsonl")


def write(path, value):
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("kind", ["chair", "pope"])
def test_evaluate_scores_what_the_model_answers(kind, tiny_llava, questions, tmp_path):
    records, folder = questions
    options = {"kind": kind, "max_new_tokens": 6, "batch_size": 2, "synonyms": TABLE if kind == "chair" else None}
    file = write(tmp_path / "questions.json", records)
    scores = evaluate(*tiny_llava, file, folder, tmp_path / "out", **options)
    found = ask(tiny_llava, records, folder, tmp_path / "alone.jsonl")
    if kind == "chair":
        assert scores == score_chair(found, [record["objects"] for record in records], TABLE)
    else:
        assert scores == score_pope(found, [record["label"] for record in records])
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == scores


def test_evaluate_reads_a_synonym_file(tiny_llava, questions, tmp_path):
    records, folder = questions
    file, table = write(tmp_path / "q.json", records[:1]), write(tmp_path / "table.json", TABLE)
    options = {"kind": "chair", "max_new_tokens": 2}
    from_file = evaluate(*tiny_llava, file, folder, tmp_path / "a", synonyms=table, **options)
    assert from_file == evaluate(*tiny_llava, file, folder, tmp_path / "b", synonyms=TABLE, **options)


def test_output_of_another_run_is_refused(tiny_llava, questions, tmp_path):
    records, folder = questions
    file = write(tmp_path / "q.json", records[:1])
    evaluate(*tiny_llava, file, folder, tmp_path / "out", kind="pope", max_new_tokens=2)
    with pytest.raises(
        ValueError, match=r"output_dir: found another run in .*\(adapter is None there and 'bpo' here\)"
    ):
        evaluate(*tiny_llava, file, folder, tmp_path / "out", kind="pope", max_new_tokens=2, adapter="bpo")


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({}, {"kind": "vqa"}, f"kind: found 'vqa', expected one of {', '.join(SCORERS)}"),
        ({}, {"kind": "chair", "synonyms": None}, "synonyms: found None, expected a synonym table for kind 'chair'"),
        ({}, {"kind": "pope", "synonyms": TABLE}, "synonyms: found a synonym table, expected None for kind 'pope'"),
        (
            {"label": None},
            {"kind": "pope"},
            "questions, record 1: found no 'label', expected id, image, question, label",
        ),
        ({"image": None}, {"kind": "pope"}, "questions, record 1: found no 'image'"),
        ({"image": "gone.png"}, {"kind": "pope"}, r"gone\.png: found no such file, expected an image"),
        (
            {"objects": ["elk"]},
            {"kind": "chair", "synonyms": TABLE},
            "objects, record 1: found 'elk', expected objects of the synonym table",
        ),
        ({}, {"kind": "chair", "synonyms": {}}, "synonyms: found {}, expected a table"),
        ({"label": "maybe"}, {"kind": "pope"}, "labels, record 1: found 'maybe', expected 'yes' or 'no'"),
        ({}, {"kind": "pope", "batch_size": 0}, "batch_size: found 0, expected at least 1"),
    ],
)
def test_mistakes_are_one_sentence(change, options, sentence, tiny_llava, questions, tmp_path):
    records, folder = questions
    records[1] = {name: value for name, value in (records[1] | change).items() if value is not None}
    with pytest.raises(ValueError, match=sentence) as error:
        evaluate(
            *tiny_llava, write(tmp_path / "q.json", records), folder, tmp_path / "out", max_new_tokens=2, **options
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({"objects": ["elk"]}, {"kind": "chair", "synonyms": TABLE}, "objects, record 1: found 'elk'"),
        ({"label": "maybe"}, {"kind": "pope"}, "labels, record 1: found 'maybe'"),
    ],
)
def test_truths_that_cannot_be_scored_are_refused_before_the_folder_is_taken(
    change, options, sentence, tiny_llava, questions, tmp_path
):
    records, folder = questions
    records[1] |= change
    with pytest.raises(ValueError, match=sentence):
        evaluate(*tiny_llava, write(tmp_path / "q.json", records), folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_scorer_is_an_entry_of_the_table(tiny_llava, questions, tmp_path, monkeypatch):
    records, folder = questions
    for record in records:
        record["words"] = 3

    def score(answers, words):
        return {"shorter": [len(answer.split()) <= most for answer, most in zip(answers, words, strict=True)]}

    checked = []
    monkeypatch.setitem(SCORERS, "short", Scorer("words", checked.extend, score))
    file = write(tmp_path / "q.json", records)
    found = ask(tiny_llava, records, folder, tmp_path / "alone.jsonl")
    scores = evaluate(*tiny_llava, file, folder, tmp_path / "out", kind="short", max_new_tokens=6, batch_size=2)
    assert scores == {"shorter": [len(answer.split()) <= 3 for answer in found]}
    assert checked == [3] * 5
    with pytest.raises(ValueError, match=r"kind: found 'long', expected one of .*, short"):
        evaluate(*tiny_llava, file, folder, tmp_path / "out", kind="long")


def test_the_table_is_read_without_heavy_imports():
    code = "import sys; import bpo_fast.evaluate.run; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_question_file_of_the_wrong_form(tiny_llava, tmp_path):
    for content, sentence in (
        ({"id": 1}, r"q\.json: found a dict, expected a JSON list"),
        ([], "questions: found none"),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluate(*tiny_llava, write(tmp_path / "q.json", content), tmp_path, tmp_path / "out", kind="pope")
    with pytest.raises(FileNotFoundError, match=r"image_folder: found no folder '.*none', expected"):
        evaluate(*tiny_llava, tmp_path / "q.json", tmp_path / "none", tmp_path / "out", kind="pope")
