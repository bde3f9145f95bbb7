"""The demo end to end with few images and two training steps; its figures at full size are the demo's own."""

import base64
import itertools
import json
import re
import shutil
import sys
from collections import Counter

import pytest
from reading import read_page
from safetensors.torch import load_file, save_file

from bpo_fast.data.pairs import load_preference_dataset
from bpo_fast.demo import grade, pipeline, report, tiny_llava, world
from bpo_fast.demo.negatives import injected_errors
from bpo_fast.evaluate.chair import score_chair
from bpo_fast.report.page import marked

SETTINGS = pipeline.DemoSettings(
    num_annotations=24, num_heldout=6, num_probe_pairs=4, train_steps=2, batch_size=2, num_noise_scenes=2
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, pipeline.run(folder, seeds=(3,), settings=SETTINGS)


def read(path):
    return json.loads(path.read_text())


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_are_those_of_the_files(finished):
    folder, results = finished
    assert read(folder / "results.json") == results
    (run,) = results["seeds"]
    questions = read(folder / "seed-3" / "heldout" / "descriptions.json")
    for method in ("base", "sft", "injected", "bpo"):
        answers = [
            line["answer"] for line in read_jsonl(folder / "seed-3" / "scores" / f"{method}-chair" / "answers.jsonl")
        ]
        expected = score_chair(answers, [row["objects"] for row in questions], world.synonym_table())
        assert run["scores"][method]["chair"] == expected | {"num_skipped": 0}
        assert results["mean"][method]["chair"]["response_rate"] == expected["response_rate"]


def test_all_methods_start_from_the_same_model_and_samples_and_all_move(finished):
    logps = finished[1]["seeds"][0]["logps"]
    assert [[point["step"] for point in history] for history in logps.values()] == [[0, 1, 2]] * 3
    assert logps["bpo"][0] == logps["sft"][0]
    assert logps["bpo"][-1] != logps["sft"][-1] != logps["sft"][0]
    # The same answers are chosen, and other ones rejected.
    assert logps["injected"][0]["chosen"] == pytest.approx(logps["sft"][0]["chosen"], rel=1e-5)
    assert logps["injected"][0]["rejected"] != logps["sft"][0]["rejected"]
    assert logps["injected"][-1] != logps["injected"][0]


def test_figures_of_the_negatives_are_those_of_the_pairs(finished):
    folder, results = finished
    pairs = load_preference_dataset(folder / "seed-3" / "pairs").remove_columns("images")
    (run,) = results["seeds"]
    assert run["negatives"]["pairs"] == Counter(pairs["rejected_type"])
    answers = []
    for pair in pairs:
        if pair["rejected_type"] == "error_injected":
            texts = (pair[side][0]["content"][0]["text"] for side in ("chosen", "rejected"))
            answers.append((json.loads(pair["details"])["error"], *texts))
    assert run["negatives"]["errors"] == injected_errors(answers)
    assert run["negatives"]["errors"]["all"]["answers"] >= 0.9 * SETTINGS.num_annotations
    assert len(run["negatives"]["noise"]["hallucinated"]) == len(pipeline.NOISE_STEPS)
    assert results["negatives"] == {name: run["negatives"][name] for name in ("noise", "errors")}
    for example in run["negatives"]["examples"]:
        weakened, injected = example["image_weakened"], example["error_injected"]
        assert (weakened["id"], weakened["chosen"]) == (injected["id"], injected["chosen"])
        assert weakened["rejected"] != injected["rejected"]


def test_held_out_images_are_not_trained_on(finished):
    folder = finished[0] / "seed-3"
    seen = {path.read_bytes() for path in (folder / "annotated" / "images").iterdir()}
    assert not seen & {path.read_bytes() for path in (folder / "heldout" / "images").iterdir()}


def test_a_killed_run_goes_on_at_the_unfinished_stage(finished):
    folder, results = finished
    adapters = [folder / "seed-3" / method / "adapter_model.safetensors" for method in pipeline.TRAINED]
    before = [path.stat().st_mtime_ns for path in adapters]
    (folder / "results.json").unlink()
    answers = folder / "seed-3" / "scores" / "bpo-chair" / "answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:3]))
    assert pipeline.run(folder, seeds=(3,), settings=SETTINGS) == results
    assert [path.stat().st_mtime_ns for path in adapters] == before
    assert len(answers.read_text().splitlines()) == 6


def test_folder_of_another_run_is_refused(finished):
    with pytest.raises(
        ValueError, match=r"output_dir: found another run in .*\(seeds is \[3\] there and \[4\] here\)"
    ):
        pipeline.run(finished[0], seeds=(4,), settings=SETTINGS)


def test_a_model_that_does_not_load_claims_no_folder(tmp_path):
    with pytest.raises(ValueError, match="missing"):
        pipeline.run(tmp_path / "run", settings=SETTINGS, model_path=tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,), (2**32,)])
def test_seeds_are_checked(seeds, tmp_path):
    with pytest.raises(ValueError, match="seeds: found"):
        pipeline.run(tmp_path / "run", seeds=seeds)


def test_the_report_holds_its_images_and_the_rates(finished):
    folder, results = finished
    source = (folder / "report.html").read_text()
    page = read_page(source)
    assert not page.tags & {"script", "link", "iframe"}
    assert not re.search(r"(src|href|srcset)=\"(?!data:)", source)
    # Eight charts, each twice, pairs of annotated images, and all held-out images, which are fewer than samples.
    examples = results["seeds"][0]["negatives"]["examples"]
    assert 0 < len(examples) <= pipeline.NUM_EXAMPLES
    assert len(page.images) == 2 * 8 + len(examples) + 6
    for example in examples:
        assert {f"Error-injected: {example['error_injected']['error']}", example["image_weakened"]["question"]} <= set(
            page.text
        )
    errors = results["negatives"]["errors"]
    assert {f"{100 * row['changed']:.1f} %" for row in errors.values()} <= set(page.text)
    assert {f"{100 * share:.1f} %" for share in results["negatives"]["noise"]["hallucinated"]} <= set(page.text)
    for image in page.images:
        assert base64.b64decode(image.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    for method in ("base", "sft", "injected", "bpo"):
        scores = results["mean"][method]
        assert f"{100 * scores['chair']['response_rate']:.0f} %" in page.text
        assert f"{100 * scores['chair']['object_rate']:.1f} %" in page.text
        assert f"{100 * scores['pope']['f1']:.1f} %" in page.text
        assert f"{100 * scores['description']['number']:.1f} %" in page.text
    assert " ".join(report.summary(results)) in page.text


def test_descriptions_are_graded_by_their_own_scenes(finished):
    folder, results = finished
    (run,) = results["seeds"]
    records = read(folder / "seed-3" / "heldout" / "descriptions.json")
    for method in pipeline.METHODS:
        lines = read_jsonl(folder / "seed-3" / "scores" / f"{method}-chair" / "answers.jsonl")
        grades = [
            grade.grade(line["answer"], world.read_scene(record)) for line, record in zip(lines, records, strict=True)
        ]
        for name, share in run["scores"][method]["description"].items():
            assert share == sum(each[name] for each in grades) / len(records)
        assert results["mean"][method]["description"] == run["scores"][method]["description"]


def test_a_finished_run_says_so_and_does_nothing(finished, capsys):
    folder, results = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert pipeline.run(folder, seeds=(3,), settings=SETTINGS) == results
    assert "this run is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_run_is_known_by_what_its_model_holds_not_by_its_path(finished, tmp_path):
    folder, results = finished
    copy = shutil.copytree(tiny_llava.CHECKPOINT, tmp_path / "copy")
    assert pipeline.run(folder, seeds=(3,), settings=SETTINGS, model_path=copy) == results
    weights = load_file(copy / "model.safetensors")
    weights["language_model.model.norm.weight"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"output_dir: found another run in .*\(model is "):
        pipeline.run(folder, seeds=(3,), settings=SETTINGS, model_path=copy)


def test_without_matplotlib_the_report_has_its_tables_and_says_how_to_have_charts(finished, monkeypatch, capsys):
    folder, results = finished
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bpo_fast.report.figures", raising=False)
    drawn = (folder / "report.html").read_bytes()
    try:
        report.write_report(folder, results)
        page = read_page((folder / "report.html").read_text())
    finally:
        (folder / "report.html").write_bytes(drawn)
    assert len(page.images) == len(results["seeds"][0]["negatives"]["examples"]) + 6  # those of pairs and samples
    assert "pip install matplotlib" in capsys.readouterr().out
    assert sum("pip install matplotlib" in text for text in page.text) == 1
    (run,) = results["seeds"]
    for point in itertools.chain.from_iterable(run["logps"].values()):
        assert {f"{point['chosen']:.2f}", f"{point['rejected']:.2f}"} <= set(page.text)
    assert {f"{value:.3f}" for side in ("true", "typical") for value in run["likelihood"][side]} <= set(page.text)


def rates(value):
    kinds = {kind: {} for _, kind, _ in report.RATES}
    for _, kind, rate in report.RATES:
        kinds[kind][rate] = value
    return kinds


def test_the_first_lines_say_gains_and_costs():
    mean = {"base": rates(0.5), "sft": rates(0.4), "injected": rates(0.9), "bpo": rates(0.4)}
    mean["bpo"]["chair"]["response_rate"] = 0.1
    mean["bpo"]["description"]["well_formed"] = 0.3
    mean["bpo"]["pope"]["accuracy"] = 0.45
    beside_sft, beside_base = report.summary({"mean": mean})
    assert beside_sft.endswith(
        "BPO gains: answers with a hallucinated object 10.0 % instead of 40.0 %, "
        "yes/no accuracy 45.0 % instead of 40.0 %. "
        "It costs: answers in whole sentences 30.0 % instead of 40.0 %."
    )
    assert beside_base.endswith(
        "BPO gains: answers with a hallucinated object 10.0 % instead of 50.0 %. "
        "It costs: exactly right answers 40.0 % instead of 50.0 %, "
        "answers in whole sentences 30.0 % instead of 50.0 %, "
        "yes/no accuracy 45.0 % instead of 50.0 %."
    )
    mean["bpo"] = mean["sft"]
    assert "gains: nothing in these figures. It costs: nothing in these figures." in report.summary({"mean": mean})[0]


def test_hallucinated_words_are_marked_in_the_report(finished):
    folder, results = finished
    source = (folder / "report.html").read_text()
    synonyms = world.synonym_table()
    answers = read_jsonl(folder / "seed-3" / "scores" / "base-chair" / "answers.jsonl")
    hallucinated = results["seeds"][0]["scores"]["base"]["chair"]["hallucinated"]
    assert any(hallucinated)
    for answer, objects in zip(answers, hallucinated, strict=True):
        expected = marked(answer["answer"], [word for item in objects for word in synonyms[item]])
        assert (expected != answer["answer"]) == bool(objects)
        assert f"<dd>{expected}</dd>" in source
