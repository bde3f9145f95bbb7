import json
import os
import random
import signal
import subprocess
import sys

import pytest
from PIL import Image
from tiny_models import SPECIAL

from bpo_fast.answers.generate import GenerationSettings, generate
from bpo_fast.answers.given import GivenModel
from bpo_fast.bootstrap import bootstrap, weaken
from bpo_fast.bootstrap.maker import draw
from bpo_fast.data import Annotation, load_preference_dataset, read_annotations, read_image
from bpo_fast.runs.files import read_json
from bpo_fast.runs.journal import Journal

SHARD, JOURNAL, DONE = "data/part-00000-of-00001.parquet", "parts/00000.jsonl", "parts/00000.json"
RESULTS = ("README.md", "manifest.json", "skipped.jsonl", SHARD)
OUTPUTS = (*RESULTS, "metadata.json", JOURNAL, DONE)
OPTIONS = {"noise_step": 700, "seed": 5, "max_new_tokens": 5, "batch_size": 2}


@pytest.fixture
def tiny_llava(tiny_llava):
    """The tiny LLaVA, kept from ending or leaving out a response."""
    model, processor = tiny_llava
    model.lm_head.weight.data[: len(SPECIAL)] = 0
    return model, processor


@pytest.fixture
def annotated(tmp_path):
    """(JSON path, image folder) of seven records: five good ones, one with a damaged image, one with none."""
    folder = tmp_path / "images"
    folder.mkdir()
    records = []
    for number in range(7):
        Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(768)).save(folder / f"{number}.png")
        question, answer = f"<image>\nw{number} w{number + 1}", " ".join(["w3"] * (number % 3 + 1))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    (folder / "4.png").unlink()
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path, folder


def lines(folder):
    path = folder / JOURNAL
    return path.read_text().splitlines() if path.exists() else []


def contents(folder):
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


@pytest.mark.parametrize("target", ["features", "pixels", "projected"])
def test_pairs_are_the_annotated_answer_and_the_answer_to_the_weakened_image(tiny_llava, annotated, tmp_path, target):
    model, processor = tiny_llava
    dataset = bootstrap(model, processor, *annotated, tmp_path / "out", noise_target=target, **OPTIONS)
    assert dataset["id"] == ["r0", "r1", "r3", "r5", "r6"]
    annotations = {annotation.id: annotation for annotation in read_annotations(*annotated)[0]}
    for pair in dataset:
        annotation = annotations[pair["id"]]
        image = read_image(annotated[1] / annotation.image)
        with weaken(model, 700, target=target, seed=5, sample_ids=[annotation.sample_id]):
            (response,) = generate(model, processor, [image], [annotation.question], GenerationSettings(5))
        assert pair["prompt"][0]["content"][1]["text"] == annotation.question
        assert pair["chosen"][0]["content"][0]["text"] == annotation.answer
        assert pair["rejected"][0]["content"][0]["text"] == response.text
        assert (pair["rejected_type"], pair["rejected_truncated"]) == ("image_weakened", response.truncated)
        assert pair["images"][0].tobytes() == image.tobytes()


def test_without_noise_the_response_is_the_models_own(tiny_llava, annotated, tmp_path):
    model, processor = tiny_llava
    dataset = bootstrap(model, processor, *annotated, tmp_path / "out", **OPTIONS | {"noise_step": None})
    pair = dataset[0]
    image = read_image(annotated[1] / "0.png")
    (response,) = generate(model, processor, [image], ["w0 w1"], GenerationSettings(5))
    assert pair["rejected"][0]["content"][0]["text"] == response.text
    assert pair["rejected_type"] == "self_generated"


def test_what_is_left_out_is_counted_and_listed(tiny_llava, annotated, tmp_path):
    model, processor = tiny_llava
    first = bootstrap(model, processor, *annotated, tmp_path / "first", **OPTIONS)
    records = json.loads(annotated[0].read_text())
    records[5]["conversations"][1]["value"] = first["rejected"][3][0]["content"][0]["text"]
    records[6]["conversations"][1]["value"] = "w " * 400
    bootstrap(model, processor, records, annotated[1], tmp_path / "out", **OPTIONS)
    skipped = {skip["id"]: skip["reason"] for skip in read_json(tmp_path / "out" / "skipped.jsonl")}
    assert list(skipped) == ["r2", "r4", "r5", "r6"]
    assert "2.png: found a file that cannot be decoded" in skipped["r2"]
    assert skipped["r4"] == "image 4.png does not exist"
    assert skipped["r5"] == "identical: responses that differ in case, punctuation and space at most"
    assert skipped["r6"] == "a response of 400 words, over max_response_words=350"
    manifest = read_json(tmp_path / "out" / "manifest.json")
    counts = manifest["counts"]
    assert (counts["records"], counts["pairs"], counts["skipped"]) == (7, 3, 4)
    settings = {
        name: manifest["settings"][f"image_weakened.{name}"] for name in ("steps", "target", "schedule", "seed")
    }
    assert settings == {"steps": [700], "target": "features", "schedule": "sigmoid", "seed": 5}


def test_rejected_responses_that_are_too_long_or_empty_are_left_out(tiny_llava, annotated, tmp_path):
    model, processor = tiny_llava
    with pytest.raises(
        ValueError,
        match=r"annotations: found no pair in 7 records \(\d with too_long: a response of .*; see .*skipped\.jsonl",
    ):
        bootstrap(model, processor, *annotated, tmp_path / "out", **OPTIONS, max_response_words=1)
    reasons = [skip["reason"] for skip in read_json(tmp_path / "out" / "skipped.jsonl")]
    assert len(reasons) == 7
    assert any(reason.startswith("too_long: a response of") for reason in reasons)
    model.generation_config.eos_token_id = list(range(len(processor.tokenizer)))  # whatever comes first ends
    model.lm_head.weight.data.zero_()  # and the first is the padding token, which is no text
    with pytest.raises(
        ValueError, match=r"annotations: found no pair in 7 records \(5 with empty: an empty response\), expected"
    ):
        bootstrap(model, processor, *annotated, tmp_path / "empty", **OPTIONS)
    assert not (tmp_path / "empty" / "manifest.json").exists()


@pytest.mark.parametrize("do_sample", [False, True])
def test_stopped_anywhere_it_ends_as_a_run_left_alone(tiny_llava, annotated, tmp_path, monkeypatch, do_sample):
    model, processor = tiny_llava
    options = OPTIONS | {"do_sample": do_sample}
    bootstrap(model, processor, *annotated, tmp_path / "whole", **options)
    append = Journal.append
    for batches in range(3):
        out = tmp_path / f"stopped-{batches}"
        left = [batches]

        def stop(journal, records, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            append(journal, records)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", stop)
            with pytest.raises(KeyboardInterrupt):
                bootstrap(model, processor, *annotated, out, **options)
        assert len(lines(out)) == 2 * batches
        assert not (out / "manifest.json").exists()
        if batches:
            with (out / JOURNAL).open("a") as journal:
                journal.write('{"key": "sha256:1')
        bootstrap(model, processor, *annotated, out, **options)
        assert contents(out) == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys
from tiny_models import SPECIAL, make_llava, make_processor
from bpo_fast.bootstrap import bootstrap
from bpo_fast.runs.journal import Journal
append, batches = Journal.append, []
def kill(journal, records):
    append(journal, records)
    batches.append(records)
    if len(batches) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.append = kill
model = make_llava()
model.lm_head.weight.data[: len(SPECIAL)] = 0
bootstrap(model, make_processor(), *sys.argv[1:], noise_step=700, seed=5, max_new_tokens=5, batch_size=2)
"""


def test_killed_it_goes_on_and_loses_nothing(tiny_llava, annotated, tmp_path):
    model, processor = tiny_llava
    bootstrap(model, processor, *annotated, tmp_path / "whole", **OPTIONS)
    out = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, *map(str, (*annotated, out))]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    done = (out / JOURNAL).read_text()
    assert len(done.splitlines()) == 4
    bootstrap(model, processor, *annotated, out, **OPTIONS)
    assert (out / JOURNAL).read_text().startswith(done)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("do_sample", [False, True])
def test_batch_size_and_order_of_records_change_nothing(tiny_llava, annotated, tmp_path, do_sample):
    model, processor = tiny_llava
    options = OPTIONS | {"do_sample": do_sample}
    expected = bootstrap(model, processor, *annotated, tmp_path / "two", **options)
    records = json.loads(annotated[0].read_text())
    out = tmp_path / "three"
    in_reverse = bootstrap(model, processor, records[::-1], annotated[1], out, **options | {"batch_size": 3})
    assert in_reverse["id"] == expected["id"][::-1]
    assert in_reverse["rejected"] == expected["rejected"][::-1]


def save(tiny_llava, folder):
    for part in tiny_llava:
        part.save_pretrained(folder)
    return folder


def test_a_model_is_loaded_from_its_path(tiny_llava, annotated, tmp_path):
    path = save(tiny_llava, tmp_path / "model")
    expected = bootstrap(*tiny_llava, *annotated, tmp_path / "model-given", **OPTIONS)
    dataset = bootstrap(path, None, *annotated, tmp_path / "out", model_init_kwargs={"dtype": "float32"}, **OPTIONS)
    assert dataset.remove_columns("model").to_dict() == expected.remove_columns("model").to_dict()


def test_a_finished_run_is_not_made_again(tiny_llava, annotated, tmp_path, monkeypatch, capsys):
    path, out = save(tiny_llava, tmp_path / "model"), tmp_path / "out"
    expected = bootstrap(path, None, *annotated, out, **OPTIONS)
    assert "finished already" not in capsys.readouterr().err
    before = contents(out), {name: (out / name).stat().st_mtime_ns for name in OUTPUTS}
    monkeypatch.setattr(GivenModel, "load", lambda given: pytest.fail("loaded"))
    again = bootstrap(path, None, *annotated, out, **OPTIONS)
    assert (contents(out), {name: (out / name).stat().st_mtime_ns for name in OUTPUTS}) == before
    assert again.to_dict() == expected.to_dict() == load_preference_dataset(out).to_dict()
    assert "out: finished already, its 5 pairs are there." in capsys.readouterr().err


def test_another_run_in_the_folder_is_refused(tiny_llava, annotated, tmp_path):
    model, processor = tiny_llava
    bootstrap(model, processor, *annotated, tmp_path / "out", **OPTIONS)
    before = contents(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"output_dir: found another run in .*out' \(image_weakened\.seed is 5 there and 6 here\)"
    ):
        bootstrap(model, processor, *annotated, tmp_path / "out", **OPTIONS | {"seed": 6})
    assert contents(tmp_path / "out") == before


def test_a_model_or_adapter_trained_again_into_the_same_folder_is_another_run(tiny_llava, annotated, tmp_path):
    path, out = save(tiny_llava, tmp_path / "model"), tmp_path / "out"
    bootstrap(path, None, *annotated, out, **OPTIONS)
    before = contents(out)
    row = tiny_llava[0].lm_head.weight.data[20]
    kept = row.clone()
    row += 1
    save(tiny_llava, path)
    with pytest.raises(
        ValueError, match=r"\(model '.*model' had other weights then: it was changed or trained again\)"
    ):
        bootstrap(path, None, *annotated, out, **OPTIONS)
    row.copy_(kept)
    save(tiny_llava, path)
    with pytest.raises(ValueError, match=r"\(dtype is 'auto' there and 'bfloat16' here\)"):
        bootstrap(path, None, *annotated, out, **OPTIONS, model_init_kwargs={"dtype": "bfloat16"})
    assert contents(out) == before


@pytest.mark.parametrize("do_sample", [False, True])
def test_added_changed_and_removed_records_cost_only_themselves(tiny_llava, annotated, tmp_path, asked, do_sample):
    path, folder = annotated
    records = json.loads(path.read_text())
    options = OPTIONS | {"do_sample": do_sample}
    bootstrap(*tiny_llava, records[:4], folder, tmp_path / "out", **options)
    asked.clear()
    records[5]["conversations"][0]["value"] = "<image> w50"
    Image.frombytes("RGB", (16, 16), random.Random(2).randbytes(768)).save(folder / "2.png")  # mended
    del records[0]
    dataset = bootstrap(*tiny_llava, records, folder, tmp_path / "out", **options)
    assert asked == [["r2", "r5"], ["r6"]]
    fresh = bootstrap(*tiny_llava, records, folder, tmp_path / "fresh", **options)
    assert dataset.to_dict() == fresh.to_dict()
    for name in RESULTS:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_more_samples_go_on_with_those_that_are_there(tiny_llava, annotated, tmp_path, asked):
    out = tmp_path / "out"
    for max_samples, wanted in ((1, 1), (3, 2), (2, 0), (None, 2)):
        asked.clear()
        dataset = bootstrap(*tiny_llava, *annotated, out, **OPTIONS, max_samples=max_samples)
        assert len(dataset) == (max_samples or 5)
        assert sum(map(len, asked)) == wanted
    assert dataset.to_dict() == bootstrap(*tiny_llava, *annotated, tmp_path / "whole", **OPTIONS).to_dict()


def test_another_limit_of_words_costs_no_response(tiny_llava, annotated, tmp_path, asked):
    records, out = json.loads(annotated[0].read_text()), tmp_path / "out"
    records[6]["conversations"][1]["value"] = " ".join(["w3"] * 8)
    whole = bootstrap(*tiny_llava, records, annotated[1], out, **OPTIONS)
    asked.clear()
    fewer = bootstrap(*tiny_llava, records, annotated[1], out, **OPTIONS, max_response_words=7)
    assert fewer["id"] == whole["id"][:-1]
    again = bootstrap(*tiny_llava, records, annotated[1], out, **OPTIONS)
    assert again.to_dict() == whole.to_dict()
    with pytest.raises(
        ValueError, match=r"found no pair in 7 records \(4 with too_long: a response of \d words, over max_response"
    ):
        bootstrap(*tiny_llava, records, annotated[1], out, **OPTIONS, max_response_words=4)
    assert not (out / "manifest.json").exists()  # which would be those of another limit
    assert asked == []


def test_a_run_that_goes_on_is_unfinished_until_its_pairs_are_whole(tiny_llava, annotated, tmp_path, monkeypatch):
    out = tmp_path / "out"
    bootstrap(*tiny_llava, *annotated, out, **OPTIONS, max_samples=2)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", lambda journal, records: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bootstrap(*tiny_llava, *annotated, out, **OPTIONS)
    with pytest.raises(ValueError, match="dataset: found an unfinished bootstrap in"):
        load_preference_dataset(out)
    assert len(bootstrap(*tiny_llava, *annotated, out, **OPTIONS)) == 5


def test_max_samples_draws_by_seed_and_a_larger_number_the_same_and_more(annotated):
    records = [f"r{number}" for number in range(2000)]
    samples = [Annotation(number, name, "1.png", "What?", "A cat.") for number, name in enumerate(records)]

    def drawn(seed, samples):
        return [sample.id for sample in sorted(samples, key=lambda sample: draw(seed, sample))]

    assert drawn(0, samples) == drawn(0, samples[::-1])
    assert drawn(0, samples) != drawn(1, samples)
    fewer = set(drawn(0, samples[:1000]))
    assert [name for name in drawn(0, samples) if name in fewer] == drawn(0, samples[:1000])
    # Uniform: of the first 1000 drawn about half come from either half of the file (4 standard deviations).
    first_half = sum(int(name[1:]) < 1000 for name in drawn(0, samples)[:1000])
    assert abs(first_half - 500) < 4 * (1000 * 0.25 * 0.5) ** 0.5


def test_sampling_follows_the_seed(tiny_llava, annotated, tmp_path):
    model, processor = tiny_llava
    options = OPTIONS | {"do_sample": True, "noise_step": None}
    first = bootstrap(model, processor, *annotated, tmp_path / "first", **options)
    other = bootstrap(model, processor, *annotated, tmp_path / "other", **options | {"seed": 6})
    assert first["rejected"][:] != other["rejected"][:]


def test_the_model_is_left_in_its_mode(tiny_llava, annotated, tmp_path):
    model, processor = tiny_llava
    model.train()
    bootstrap(model, processor, *annotated, tmp_path / "out", **OPTIONS)
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: found 0, expected at least 1"),
        ({"max_samples": 0}, "max_samples: found 0, expected at least 1 or None"),
        ({"noise_step": 1000}, "noise_step: found 1000, expected a step from 0 to 999"),
        ({"noise_target": "image"}, "noise_target: found 'image', expected one of features, pixels, projected"),
        ({"schedule": "exp"}, "schedule: found 'exp', expected one of sigmoid, linear, cosine"),
        ({"seed": None}, "seed: found None, expected a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens: found None, expected at least 1"),
        ({"temperature": 0.7}, "temperature: found 0.7, expected None with greedy decoding"),
    ],
)
def test_mistakes_are_found_before_the_folder_is_taken(tiny_llava, annotated, tmp_path, options, message):
    model, processor = tiny_llava
    with pytest.raises(ValueError, match=message):
        bootstrap(model, processor, *annotated, tmp_path / "out", **OPTIONS | options)
    assert not (tmp_path / "out").exists()
