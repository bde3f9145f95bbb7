"""What a training hands to its forecast, and that none is made where there is no GPU."""

import pytest
from datasets import Dataset
from tiny_models import make_pairs, make_processor
from tiny_world import make_world

from bpo_fast.cli import main as cli
from bpo_fast.plan import before
from bpo_fast.train.collator import PreferenceCollator
from bpo_fast.train.config import BPOConfig
from bpo_fast.train.run import _first_lengths


@pytest.mark.parametrize(("options", "branches"), [({}, 2), ({"loss_type": "sft"}, 1)])
def test_lengths_are_those_of_the_first_batch(tmp_path, options, branches):
    processor, pairs = make_processor(), Dataset.from_list(make_pairs(5))
    config = BPOConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=3, **options)
    (sequence,) = PreferenceCollator(processor, -1, max_length=1024)([pairs[n] for n in range(3)])["sequences"]
    lengths = _first_lengths(config, processor, pairs)
    assert [prefix for prefix, *_ in lengths] == list(sequence.packing.prefix_lengths)
    expected = [(both * 2)[:2] for both in (each[:branches] for each in sequence.packing.branch_lengths)]
    assert [tuple(answers) for _, *answers in lengths] == expected


def test_a_batch_that_cannot_be_collated_has_no_lengths(tmp_path):
    pairs = Dataset.from_list([pair | {"chosen": None} for pair in make_pairs(2)])
    config = BPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert _first_lengths(config, make_processor(), pairs) is None


def test_on_a_cpu_nothing_is_said(tmp_path, monkeypatch, capsys):
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(before, "forecast_of", lambda *_: pytest.fail("there is no card"))
    assert cli.main(["train", "--config", "run.yaml", "--output_dir", "out", "--max_steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Forecast" not in printed
    assert "GPU" not in printed
