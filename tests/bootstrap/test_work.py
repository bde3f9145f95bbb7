"""How processes share a run: the same bytes whoever makes what, and nothing made twice."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from shared_run import NUM_SAMPLES, Reversed, contents, kill_at_random, make_samples, notes, run, start
from tiny_families import REFUSED
from tiny_models import SPECIAL

from bpo_fast.answers.sampling import GenerationSettings
from bpo_fast.answers.score import score_answers
from bpo_fast.bootstrap import bootstrap, work
from bpo_fast.bootstrap.filters import FilterOptions
from bpo_fast.bootstrap.image_weakened import ImageWeakened
from bpo_fast.bootstrap.run import own_device
from bpo_fast.bootstrap.self_generated import SelfGenerated
from bpo_fast.bootstrap.sft import ChosenOnly
from bpo_fast.data import load_preference_dataset
from bpo_fast.runs.files import read_json


@pytest.fixture
def records(tmp_path):
    return make_samples(tmp_path)


def made(tmp_path, out):
    """The ids that were made, once a time that they were."""
    return sorted(int(name) for _, *names in notes(tmp_path, out) for name in names)


TEXTS = ("chosen", "rejected")
READABLE = [number for number in range(NUM_SAMPLES) if number not in (5, 17)]


@pytest.mark.parametrize("count", [2, 5])
def test_processes_that_share_a_folder_write_the_bytes_of_one(records, tmp_path, count):
    run(tmp_path, "one", records)
    slow = [Reversed(str(tmp_path / "many.notes"), seconds=0.1)]
    processes = start(count, tmp_path, "many", records, kinds=slow)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert made(tmp_path, "many") == made(tmp_path, "one") == READABLE
    assert len({process for process, *_ in notes(tmp_path, "many")}) > 1  # one that starts late finds nothing to do
    assert not [path.name for path in (tmp_path / "many").rglob(".*")]


def test_the_part_of_a_killed_process_is_taken_over_where_it_stopped(records, tmp_path):
    run(tmp_path, "one", records)
    slow = [Reversed(str(tmp_path / "killed.notes"), seconds=0.15)]
    first, second = start(2, tmp_path, "killed", records, kinds=slow)
    while not (tmp_path / "killed.notes").exists() or not any(
        process == str(first.pid) for process, *_ in notes(tmp_path, "killed")
    ):
        time.sleep(0.01)
    time.sleep(0.05)  # in its second batch, for all we know
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join()
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL, 0)
    assert contents(tmp_path / "killed") == contents(tmp_path / "one")
    again = len(made(tmp_path, "killed")) - len(READABLE)
    assert 0 <= again <= 2  # a batch that was made, and perhaps not yet written


def test_killed_at_random_moments_processes_end_with_the_same_bytes(records, tmp_path):
    run(tmp_path, "one", records)
    assert kill_at_random(tmp_path, "killed", records, count=3, kills=8, seed=0) == [0, 0, 0]
    assert contents(tmp_path / "killed") == contents(tmp_path / "one")
    journals = [line for path in (tmp_path / "killed/parts").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(int(json.loads(line)["id"]) for line in journals) == READABLE


def test_a_finished_run_holds_nothing_that_a_killed_process_left_half_written(records, tmp_path):
    (process,) = start(1, tmp_path, "out", records, kinds=[Reversed(str(tmp_path / "out.notes"), seconds=0.1)])
    while not (tmp_path / "out/data").exists():
        time.sleep(0.01)
    for folder in ("data", "parts"):
        (tmp_path / "out" / folder / ".half.7.tmp").touch()
    process.join()
    assert process.exitcode == 0
    assert not [path.name for path in (tmp_path / "out").rglob(".*")]


def test_processes_with_other_samples_keep_out_of_a_folder_at_work(records, tmp_path):
    slow = [Reversed(str(tmp_path / "out.notes"), seconds=0.3)]
    (process,) = start(1, tmp_path, "out", records, kinds=slow)
    while not (tmp_path / "out.notes").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match=r"output_dir: found a process at work in '.*out' on something else, exp"):
        run(tmp_path, "out", records[:-1])
    process.join()
    assert process.exitcode == 0
    assert len(load_preference_dataset(tmp_path / "out")) == len(READABLE)


def test_shards_make_their_parts_and_the_last_one_the_whole(records, tmp_path):
    run(tmp_path, "one", records)
    assert run(tmp_path, "two", records, num_shards=2, shard_index=0) is None
    with pytest.raises(ValueError, match=r"dataset: found an unfinished bootstrap in '.*two'"):
        load_preference_dataset(tmp_path / "two")
    assert len(run(tmp_path, "two", records, num_shards=2, shard_index=1)) == len(READABLE)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    with pytest.raises(ValueError, match="shard_index: found 2, expected a number from 0 to 1"):
        run(tmp_path, "two", records, num_shards=2, shard_index=2)


def test_another_cut_into_parts_costs_no_response(records, tmp_path):
    run(tmp_path, "out", records[3:], rows_per_part=4)
    run(tmp_path, "out", records)
    assert made(tmp_path, "out") == READABLE
    run(tmp_path, "fresh", records)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_further_kind_costs_only_itself_and_one_fewer_nothing(records, tmp_path):
    reverse = Reversed(str(tmp_path / "out.notes"))
    run(tmp_path, "out", records, kinds=[reverse])
    (tmp_path / "out.notes").write_text("")
    both = run(tmp_path, "out", records, kinds=[ChosenOnly(), reverse])
    assert made(tmp_path, "out") == []
    assert both["rejected_type"] == ["self_generated", "sft"] * len(READABLE)
    assert (both[1]["rejected"], both[1]["chosen"]) == (None, both[0]["chosen"])
    alone = run(tmp_path, "out", records, kinds=[ChosenOnly()])
    assert alone["rejected_type"] == ["sft"] * len(READABLE)
    assert made(tmp_path, "out") == []


def test_a_changed_answer_costs_the_kinds_that_are_made_of_it(records, tmp_path):
    run(tmp_path, "out", records, kinds=[Reversed(str(tmp_path / "out.notes")), ChosenOnly()])
    (tmp_path / "out.notes").write_text("")
    records[8]["conversations"][1]["value"] = "a blue dog"
    pairs = run(tmp_path, "out", records, kinds=[Reversed(str(tmp_path / "out.notes")), ChosenOnly()])
    assert made(tmp_path, "out") == [8]
    changed = [pair for pair in pairs if pair["id"] == "8"]
    texts = [pair["chosen"][0]["content"][0]["text"] for pair in changed]
    assert texts == ["a blue dog"] * 2
    assert changed[0]["rejected"][0]["content"][0]["text"] == "dog blue a"


def test_each_process_of_a_launcher_takes_its_own_gpu(monkeypatch):
    assert own_device({"dtype": "auto"}) == {"dtype": "auto"}
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert own_device({"dtype": "auto"}) == {"dtype": "auto", "device": "cuda:1"}
    assert own_device({"device": "cpu"}) == {"device": "cpu"}


def test_kinds_without_a_model_take_none_and_unreadable_images_are_counted(records, tmp_path):
    pairs = run(tmp_path, "out", records)
    assert pairs["seed"][:2] == [3, 3]
    assert pairs["model"][0] is None
    manifest = read_json(tmp_path / "out/manifest.json")
    assert manifest["settings"] == {"self_generated.seed": 3}
    assert manifest["counts"]["kinds"] == {"self_generated": len(READABLE)}
    skipped = read_json(tmp_path / "out/skipped.jsonl")
    assert [(skip["id"], skip["cause"]) for skip in skipped] == [
        ("5", "an image that cannot be read"),
        ("17", "an image that cannot be read"),
    ]


@pytest.fixture
def annotated(tmp_path):
    """Seven records about noise, and where their images are."""
    (tmp_path / "noise").mkdir()
    records = []
    for number in range(7):
        Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(768)).save(tmp_path / f"noise/{number}.png")
        answer = " ".join(["w3"] * (number % 3 + 1))
        turns = [{"from": "human", "value": f"<image>\nw{number}"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    return records, tmp_path / "noise"


def test_batches_of_1_4_and_16_write_the_same_bytes_with_log_probs_of_each_pair_alone(tiny_llava, annotated, tmp_path):
    model, processor = tiny_llava
    model.lm_head.weight.data[: len(SPECIAL)] = 0
    found = {}
    for batch_size in (1, 4, 16):
        out = tmp_path / str(batch_size)
        kinds = [ImageWeakened(steps=(300, 900), decoding=GenerationSettings(5))]
        options = {"kinds": kinds, "score_pairs": True, "rows_per_part": 4, "batch_size": batch_size}
        pairs = bootstrap(model, processor, *annotated, out, **options)
        found[batch_size] = {path.name: path.read_bytes() for path in (*out.glob("*.*"), *out.glob("data/*"))}
    assert found[1] == found[4] == found[16]
    assert pairs["step"] == [300, 900] * 7
    for pair in pairs.select([0, 13]):
        texts = [pair[name][0]["content"][0]["text"] for name in TEXTS]
        question = pair["prompt"][0]["content"][1]["text"]
        chosen, rejected = score_answers(model, processor, pair["images"][0], question, texts)
        assert (pair["chosen_logp"], pair["rejected_logp"]) == (chosen.logp, rejected.logp)
    means = [[pair[f"{name}_logp"] / num_tokens(processor, pair[name]) for name in TEXTS] for pair in pairs]
    gaps = sorted(abs(chosen - rejected) for chosen, rejected in means)
    options["filters"] = FilterOptions(min_logp_gap=(gaps[3] + gaps[4]) / 2)
    fewer = bootstrap(model, processor, *annotated, out, **options)
    assert len(fewer) == len(pairs) - 4
    assert {skip["cause"] for skip in read_json(out / "skipped.jsonl")} == {"logp_gap"}


def test_a_pair_that_cannot_be_scored_has_no_log_probs_and_stops_nothing(tiny_llava, annotated, tmp_path, monkeypatch):
    def refuse(model, processor, image, prompt, answers):
        if refused in answers:
            raise ValueError("answer: found <img> in the text, expected none.")
        return score_answers(model, processor, image, prompt, answers)

    monkeypatch.setattr(work, "score_answers", refuse)
    tiny_llava[0].lm_head.weight.data[: len(SPECIAL)] = 0
    options, refused = {"kinds": [ImageWeakened(decoding=GenerationSettings(5))], "score_pairs": True}, "w3 w3"
    for _ in range(2):  # the second time from the journal
        pairs = bootstrap(*tiny_llava, *annotated, tmp_path / "out", **options)
        texts = [chosen[0]["content"][0]["text"] for chosen in pairs["chosen"]]
        assert refused in texts
        assert [each is None for each in pairs["rejected_logp"]] == [text == refused for text in texts]
        assert read_json(tmp_path / "out" / "manifest.json")["counts"]["unscored"] == texts.count(refused)


def test_a_model_whose_log_probs_would_be_wrong_is_refused_first(annotated, tmp_path):
    make, *_ = REFUSED["Qwen2-VL"]
    out = tmp_path / "out"
    options = {"kinds": [SelfGenerated(decoding=GenerationSettings(2))]}
    with pytest.raises(ValueError, match=r"^model: found Qwen2VL.* docs/models.md lists"):
        bootstrap(*make(), *annotated, out, score_pairs=True, **options)
    assert not list(out.glob("parts/*.jsonl"))


def num_tokens(processor, response):
    """Tokens of a response, with the end token that the template adds."""
    return len(processor.tokenizer(response[0]["content"][0]["text"], add_special_tokens=False)["input_ids"]) + 1


def test_log_probs_are_asked_for_where_their_filter_is(records, tmp_path):
    with pytest.raises(ValueError, match="min_logp_gap: found it without score_pairs, expected both; set score_pairs"):
        run(tmp_path, "out", records, filters=FilterOptions(min_logp_gap=0.1))
    assert not Path(tmp_path, "out").exists()
