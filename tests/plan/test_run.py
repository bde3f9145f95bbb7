"""`bpo-fast plan`: presets, cards, what it prints and what it refuses."""

import json

import pytest

from bpo_fast.cli import main as cli
from bpo_fast.cli.names import CARDS as CARD_NAMES
from bpo_fast.cli.names import PRESETS as PRESET_NAMES
from bpo_fast.plan.cards import CARDS, GIB, as_card
from bpo_fast.plan.shapes import PRESETS, find_config, image_tokens

PLAN = ["plan", "--model", "llava-1.5-13b", "--gpu", "a40", "--pairs", "4"]


@pytest.fixture(scope="module")
def planned():
    """What `bpo-fast plan --json` prints for LLaVA-1.5-13B on an A40."""
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(printed := StringIO()):
        assert cli.main([*PLAN, "--json"]) == 0
    return json.loads(printed.getvalue())


def test_13b_on_an_a40(planned):
    pytest.importorskip("bitsandbytes")
    assert planned["peak_gib"] <= 14
    assert planned["peak_gib"] == pytest.approx(sum(planned["memory_gib"].values()), abs=0.01)
    # Six products of a weight and a token: forward, recompute and the input's gradient; head, adapter and attention
    # are a few per cent more.
    weights = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    (tokens,) = planned["sequence_lengths"]
    assert 1 < planned["flops_per_pair"] * 4 / (6 * weights * tokens) < 1.1
    # 4 bits a weight, a byte of scale for 64 weights, a float32 scale for 256 of those.
    assert planned["memory_gib"]["language model"] == pytest.approx(
        weights * (0.5 + 1 / 64 + 4 / 64 / 256) / GIB, rel=0.001
    )
    adapter = 40 * 64 * (4 * 2 * 5120 + 3 * (5120 + 13824))
    assert planned["memory_gib"]["adapter"] == pytest.approx(4 * adapter / GIB, rel=0.001)
    assert planned["memory_gib"]["optimizer state"] == pytest.approx(adapter * (2 + 8 / 256) / GIB, rel=0.01)
    assert planned["paper_hours"] == 28
    assert any("assumed, not measured" in text for text in planned["assumptions"])


def test_names_for_the_help_are_those_of_the_tables():
    assert tuple(CARDS) == CARD_NAMES
    assert PRESETS == PRESET_NAMES


def test_presets_are_the_published_shapes():
    config = find_config("llava-hf/llava-1.5-7b-hf")
    assert image_tokens(config) == 576
    text = config.get_text_config()
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size) == (
        4096,
        11008,
        32,
        32064,
    )


@pytest.mark.parametrize(
    ("name", "memory_gib", "expected"),
    [
        ("NVIDIA A40", 44.4, "a40"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100 80GB PCIe", 79.2, "a100-80"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA L4", 22.0, "l4"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx4090"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA Something", 44.4, None),
    ],
)
def test_a_device_has_the_rates_of_its_name(name, memory_gib, expected):
    card = as_card(name, int(memory_gib * GIB), 84)
    known = CARDS.get(expected)
    assert (card.rate, card.bandwidth) == ((known.rate, known.bandwidth) if known else (None, None))
    assert card.memory_gib == pytest.approx(memory_gib)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--gpu", "a41"], "gpu: found 'a41', expected one of a40"),
        (["--gpu", "a40", "--pairs", "0"], "pairs: found 0, expected a whole number of at least 1"),
        (["--gpu", "a40", "--model", "llava-1.5-14b"], "did you mean llava-1.5-13b?"),
        (["--gpu", "a40", "--model", "text"], "found a configuration of 'llama' without vision_config in"),
        (["--gpu", "a40", "--model", "broken"], "expected a transformers config.json"),
        (["--gpu", "a40", "--model", "other"], "expected a transformers config.json"),
        (["--gpu", "a40", "--token_budget", "100"], "token_budget: found 100, expected at least"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(tmp_path, monkeypatch, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    for name, text in {"text": '{"model_type": "llama"}', "broken": '{"model_type": ', "other": "[1]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    status = cli.main(["plan", *options])
    printed = capsys.readouterr().err
    assert status == 2
    assert sentence in printed
    assert "Traceback" not in printed
    assert [path.name for path in tmp_path.iterdir()] != []


def test_a_folder_is_planned_and_printed(tmp_path, capsys):
    values = find_config("llava-1.5-7b").to_dict()
    values["text_config"] |= {"num_hidden_layers": 1}
    values["vision_config"] |= {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert cli.main(["plan", "--model", str(tmp_path), "--gpu", "l4", "--pairs", "1", "--quantization", "none"]) == 0
    printed = capsys.readouterr().out
    assert "l4 has 22.0 GiB: it fits." in printed
    assert "The paper took" not in printed
