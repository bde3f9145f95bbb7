import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from bpo_fast.answers import generate as generate_module
from bpo_fast.answers.given import GivenModel
from bpo_fast.evaluate import evaluate
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


def alone(tiny_llava, record, folder):
    """The greedy answer to one question, unpadded."""
    model, processor = tiny_llava
    with Image.open(folder / record["image"]) as image:
        prompt = f"<s> USER: <image> {record['question']} ASSISTANT: "
        inputs = processor(text=[prompt], images=[image.convert("RGB")], add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def pope(tiny_llava, records, folder, out, **options):
    """Evaluates records by "pope"; the scores."""
    file = write(folder / "questions.json", records)
    options = {"kind": "pope", "max_new_tokens": 6, "batch_size": 2} | options
    return evaluate(*tiny_llava, file, folder, out, **options)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("kind", ["chair", "pope"])
def test_evaluate_scores_what_the_model_answers(kind, tiny_llava, questions, tmp_path):
    records, folder = questions
    scores = pope(
        tiny_llava, records, folder, tmp_path / "out", kind=kind, synonyms=TABLE if kind == "chair" else None
    )
    found = [alone(tiny_llava, record, folder) for record in records]
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert lines == [{"id": record["id"], "answer": answer} for record, answer in zip(records, found, strict=True)]
    if kind == "chair":
        expected = score_chair(found, [record["objects"] for record in records], TABLE)
    else:
        expected = score_pope(found, [record["label"] for record in records])
    assert scores == expected | {"num_skipped": 0}
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == scores
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == ""


def test_unreadable_images_are_listed_and_left_out_of_the_score(tiny_llava, questions, tmp_path, asked):
    records, folder = questions
    whole = pope(tiny_llava, records, folder, tmp_path / "whole")
    image = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(image[:60])
    (folder / "1.png").rename(folder / "away.png")
    scores = pope(tiny_llava, records, folder, tmp_path / "out")
    kept = [records[number] for number in (0, 2, 4)]
    answers = [alone(tiny_llava, record, folder) for record in kept]
    assert scores == score_pope(answers, [record["label"] for record in kept]) | {"num_skipped": 2}
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["record"], line["id"]) for line in lines] == [(1, "1"), (3, "3")]
    assert "1.png: found no such file" in lines[0]["reason"]
    assert "3.png: found a file that cannot be decoded" in lines[1]["reason"]
    # Mended, they cost only themselves, and the end is that of a run that found them whole.
    (folder / "3.png").write_bytes(image)
    (folder / "away.png").rename(folder / "1.png")
    asked.clear()
    assert pope(tiny_llava, records, folder, tmp_path / "out") == whole
    assert asked == [["1", "3"]]
    for name in ("answers.jsonl", "scores.json", "skipped.jsonl", "metadata.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_mended_added_and_removed_questions_cost_only_themselves(tiny_llava, questions, tmp_path, asked):
    records, folder = questions
    pope(tiny_llava, records[1:4], folder, tmp_path / "out")
    asked.clear()
    changed = [records[0], records[3], records[2] | {"question": "w40 w41", "label": "yes"}, records[4]]
    changed[1] = changed[1] | {"label": "no"}
    scores = pope(tiny_llava, changed, folder, tmp_path / "out")
    assert asked == [["0", "2"], ["4"]]
    assert scores == pope(tiny_llava, changed, folder, tmp_path / "fresh")
    for name in ("answers.jsonl", "scores.json", "skipped.jsonl", "metadata.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    asked.clear()
    other_label = [record | {"label": "yes"} for record in changed]
    answers = [alone(tiny_llava, record, folder) for record in changed]
    assert (
        pope(tiny_llava, other_label, folder, tmp_path / "out")["accuracy"]
        == score_pope(answers, ["yes"] * 4)["accuracy"]
    )
    assert asked == []


def test_killed_run_goes_on_and_ends_the_same(tiny_llava, questions, tmp_path, monkeypatch):
    records, folder = questions
    pope(tiny_llava, records, folder, tmp_path / "whole")
    calls, generate = [], generate_module.generate

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(generate_module, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        pope(tiny_llava, records, folder, tmp_path / "cut")
    assert sorted(contents(tmp_path / "cut")) == ["metadata.json", "responses.jsonl"]
    pope(tiny_llava, records, folder, tmp_path / "cut")
    assert len(calls) == 2 + 2  # the first batch was not asked again
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_finished_run_is_left_alone_and_says_so(tiny_llava, questions, tmp_path, monkeypatch, capsys):
    records, folder = questions
    for part in tiny_llava:
        part.save_pretrained(tmp_path / "model")
    file, out = write(tmp_path / "q.json", records), tmp_path / "out"
    scores = evaluate(tmp_path / "model", None, file, folder, out, kind="pope", max_new_tokens=2)
    assert "finished" not in capsys.readouterr().err
    before = contents(out), {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(GivenModel, "load", lambda given: pytest.fail("loaded"))
    assert evaluate(tmp_path / "model", None, file, folder, out, kind="pope", max_new_tokens=2) == scores
    assert (contents(out), {path.name: path.stat().st_mtime_ns for path in out.iterdir()}) == before
    assert "out: finished already, its 5 responses are there." in capsys.readouterr().err
    for name in ("answers.jsonl", "scores.json", "skipped.jsonl"):  # damaged or lost, they are made again
        (out / name).write_text("garbage")
    (out / "scores.json").unlink()
    evaluate(tmp_path / "model", None, file, folder, out, kind="pope", max_new_tokens=2)
    assert contents(out) == before[0]


def test_an_adapter_trained_again_into_the_same_folder_is_another_run(tiny_llava, questions, tmp_path):
    model = tiny_llava[0]
    records, folder = questions
    for part in tiny_llava:
        part.save_pretrained(tmp_path / "model")
    file, out, bpo = write(tmp_path / "q.json", records), tmp_path / "out", tmp_path / "bpo"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(bpo)
    options = {"kind": "pope", "max_new_tokens": 2, "adapter": bpo}
    scores = evaluate(tmp_path / "model", None, file, folder, out, **options)
    before = contents(out)
    bpo.rename(tmp_path / "moved")
    assert evaluate(tmp_path / "model", None, file, folder, out, **options | {"adapter": tmp_path / "moved"}) == scores
    next(p for name, p in adapted.named_parameters() if "lora_B" in name).data += 0.01
    adapted.save_pretrained(bpo)
    with pytest.raises(
        ValueError,
        match=r"output_dir: found another run in .*out' \(adapter '.*bpo' had other weights then: it was changed or "
        r"trained again\), expected this run or an empty folder; choose another output_dir\.",
    ):
        evaluate(tmp_path / "model", None, file, folder, out, **options)
    assert contents(out) == before


def test_evaluate_reads_a_synonym_file(tiny_llava, questions, tmp_path):
    records, folder = questions
    file, table = write(tmp_path / "q.json", records[:1]), write(tmp_path / "table.json", TABLE)
    options = {"kind": "chair", "max_new_tokens": 2}
    from_file = evaluate(*tiny_llava, file, folder, tmp_path / "a", synonyms=table, **options)
    assert from_file == evaluate(*tiny_llava, file, folder, tmp_path / "b", synonyms=TABLE, **options)


def test_output_of_another_run_is_refused(tiny_llava, questions, tmp_path):
    records, folder = questions
    pope(tiny_llava, records[:1], folder, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"output_dir: found another run in .*\(max_new_tokens is 6 there and 7 here\)"
    ):
        pope(tiny_llava, records[:1], folder, tmp_path / "out", max_new_tokens=7)


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
        (
            {"id": "0"},
            {"kind": "pope"},
            "questions, record 1: found the id '0' that record 0 has, expected one of its",
        ),
        ({"id": ["1"]}, {"kind": "pope"}, r"questions, record 1: found id \['1'\], expected a text or a whole number"),
        (
            {"objects": ["elk"]},
            {"kind": "chair", "synonyms": TABLE},
            "objects, record 1: found 'elk', expected objects of the synonym table",
        ),
        ({}, {"kind": "chair", "synonyms": {}}, "synonyms: found {}, expected a table"),
        ({"label": "maybe"}, {"kind": "pope"}, "labels, record 1: found 'maybe', expected 'yes' or 'no'"),
        ({}, {"kind": "pope", "batch_size": 0}, "batch_size: found 0, expected at least 1"),
        ({}, {"kind": "pope", "batch_size": None}, "batch_size: found None, expected at least 1"),
        ({}, {"kind": "pope", "max_new_tokens": None}, "max_new_tokens: found None, expected at least 1"),
    ],
)
def test_mistakes_are_one_sentence(change, options, sentence, tiny_llava, questions, tmp_path):
    records, folder = questions
    records[1] = {name: value for name, value in (records[1] | change).items() if value is not None}
    with pytest.raises(ValueError, match=sentence) as error:
        pope(tiny_llava, records, folder, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
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
    found = [alone(tiny_llava, record, folder) for record in records]
    scores = evaluate(*tiny_llava, file, folder, tmp_path / "out", kind="short", max_new_tokens=6, batch_size=2)
    assert scores == {"shorter": [len(answer.split()) <= 3 for answer in found], "num_skipped": 0}
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
