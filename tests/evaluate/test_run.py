import json

import pytest
import torch
from PIL import Image

from bpo_fast.evaluate import answers as answers_module
from bpo_fast.evaluate import evaluate, generate_answers
from bpo_fast.evaluate.chair import score_chair
from bpo_fast.evaluate.pope import score_pope

TABLE = {"w3": ["w3", "w30"], "w5": ["w5"], "w7": ["w7"]}


@pytest.fixture
def questions(tmp_path):
    """Five questions about five pictures: (rows, image folder)."""
    torch.manual_seed(0)
    rows = []
    for index in range(5):
        pixels = torch.randint(0, 255, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        row = {"id": str(index), "image": f"{index}.png", "question": " ".join(["w1"] * (index + 1))}
        rows.append(row | {"objects": ["w3"], "label": "yes" if index % 2 else "no"})
    return rows, tmp_path


def ask(tiny_llava, rows, folder, file, **options):
    model, processor = tiny_llava
    options = {"max_new_tokens": 6, "batch_size": 2} | options
    return generate_answers(model, processor, rows, image_folder=folder, answers_file=file, **options)


def test_answers_are_greedy_generation_of_each_question_alone(tiny_llava, questions, tmp_path):
    model, processor = tiny_llava
    rows, folder = questions
    found = ask(tiny_llava, rows, folder, tmp_path / "answers.jsonl")
    for row, answer in zip(rows, found, strict=True):
        with Image.open(folder / row["image"]) as image:
            prompt = f"<s> USER: <image> {row['question']} ASSISTANT: "
            inputs = processor(
                text=[prompt], images=[image.convert("RGB")], add_special_tokens=False, return_tensors="pt"
            )
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert lines == [{"id": row["id"], "answer": answer} for row, answer in zip(rows, found, strict=True)]


def test_killed_run_goes_on_and_ends_the_same(tiny_llava, questions, tmp_path, monkeypatch):
    rows, folder = questions
    whole = ask(tiny_llava, rows, folder, tmp_path / "whole.jsonl")
    calls, generate = [], answers_module.generate

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(answers_module, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        ask(tiny_llava, rows, folder, tmp_path / "cut.jsonl")
    assert len((tmp_path / "cut.jsonl").read_text().splitlines()) == 2
    assert ask(tiny_llava, rows, folder, tmp_path / "cut.jsonl") == whole
    assert len(calls) == 2 + 2  # the first batch was not asked again


def test_model_comes_back_in_the_mode_it_was_in(tiny_llava, questions, tmp_path):
    tiny_llava[0].train()
    ask(tiny_llava, *questions, tmp_path / "answers.jsonl")
    assert tiny_llava[0].training


def test_answers_to_other_questions_are_refused(tiny_llava, questions, tmp_path):
    rows, folder = questions
    ask(tiny_llava, rows, folder, tmp_path / "answers.jsonl")
    others = [row | {"id": f"other-{row['id']}"} for row in rows]
    with pytest.raises(ValueError, match="answers '0' in row 0, expected 'other-0'"):
        ask(tiny_llava, others, folder, tmp_path / "answers.jsonl")


def write(path, value):
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("kind", ["chair", "pope"])
def test_evaluate_scores_what_the_model_answers(kind, tiny_llava, questions, tmp_path):
    rows, folder = questions
    options = {"kind": kind, "max_new_tokens": 6, "batch_size": 2, "synonyms": TABLE if kind == "chair" else None}
    file = write(tmp_path / "questions.json", rows)
    scores = evaluate(*tiny_llava, file, folder, tmp_path / "out", **options)
    found = ask(tiny_llava, rows, folder, tmp_path / "alone.jsonl")
    if kind == "chair":
        assert scores == score_chair(found, [row["objects"] for row in rows], TABLE)
    else:
        assert scores == score_pope(found, [row["label"] for row in rows])
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == scores


def test_evaluate_reads_a_synonym_file(tiny_llava, questions, tmp_path):
    rows, folder = questions
    file, table = write(tmp_path / "q.json", rows[:1]), write(tmp_path / "table.json", TABLE)
    options = {"kind": "chair", "max_new_tokens": 2}
    from_file = evaluate(*tiny_llava, file, folder, tmp_path / "a", synonyms=table, **options)
    assert from_file == evaluate(*tiny_llava, file, folder, tmp_path / "b", synonyms=TABLE, **options)


def test_output_of_another_run_is_refused(tiny_llava, questions, tmp_path):
    rows, folder = questions
    file = write(tmp_path / "q.json", rows[:1])
    evaluate(*tiny_llava, file, folder, tmp_path / "out", kind="pope", max_new_tokens=2)
    with pytest.raises(ValueError, match="holds another run"):
        evaluate(*tiny_llava, file, folder, tmp_path / "out", kind="pope", max_new_tokens=2, adapter="bpo")


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({}, {"kind": "vqa"}, "kind: found 'vqa', expected one of chair, pope"),
        ({}, {"kind": "chair", "synonyms": None}, "kind 'chair' needs a synonym table"),
        ({}, {"kind": "pope", "synonyms": TABLE}, "only kind 'chair' reads a synonym table"),
        ({"label": None}, {"kind": "pope"}, "row 1 has no 'label'"),
        ({"image": None}, {"kind": "pope"}, "row 1 has no 'image'"),
        ({"image": "gone.png"}, {"kind": "pope"}, r"gone\.png does not exist"),
        ({"objects": ["elk"]}, {"kind": "chair", "synonyms": TABLE}, "'elk' is not in the synonym table"),
        ({}, {"kind": "chair", "synonyms": {}}, "the table is empty"),
        ({}, {"kind": "pope", "batch_size": 0}, "batch_size: found 0"),
    ],
)
def test_mistakes_are_one_sentence(change, options, sentence, tiny_llava, questions, tmp_path):
    rows, folder = questions
    rows[1] = {name: value for name, value in (rows[1] | change).items() if value is not None}
    with pytest.raises(ValueError, match=sentence) as error:
        evaluate(*tiny_llava, write(tmp_path / "q.json", rows), folder, tmp_path / "out", max_new_tokens=2, **options)
    assert "\n" not in str(error.value)


def test_question_file_of_the_wrong_form(tiny_llava, tmp_path):
    for content, sentence in (({"id": 1}, "holds a dict, expected a JSON list"), ([], "questions: found none")):
        with pytest.raises(ValueError, match=sentence):
            evaluate(*tiny_llava, write(tmp_path / "q.json", content), tmp_path, tmp_path / "out", kind="pope")
    with pytest.raises(FileNotFoundError, match="image_folder"):
        evaluate(*tiny_llava, tmp_path / "q.json", tmp_path / "none", tmp_path / "out", kind="pope")
