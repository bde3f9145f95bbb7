"""The training steps that throughput.py compares: same batches, every idea that is switched off, and its floor."""

from types import SimpleNamespace

import pytest
import torch
from benching import Progress

TOY = ["--steps=1", "--pairs=1", "--response-tokens=6", "--hidden-size=64", "--intermediate-size=64"]
TOY += ["--num-hidden-layers=2", "--num-attention-heads=2", "--vocab-size=512", "--image-size=28"]
TOY += ["--vision-hidden-size=32", "--vision-layers=2", "--lora-r=2"]


def test_trainers_train_on_the_same_batches():
    import throughput

    options, progress = throughput.parse(TOY), Progress()
    plain = throughput.CHECKPOINTING["without"]
    change = plain | throughput.CACHES | {"share_prefixes": False, "pack_pairs": False}
    options.with_floor = True
    found = throughput.measure({throughput.OURS: change, throughput.TRL: plain}, "a step", options, progress)
    assert progress.n == 6
    assert found["shape"]["image tokens"] == 4
    ours, theirs = found["rows"].values()
    assert len(ours["losses"]) == 2
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
    tokens = [row["tokens_per_second"] * row["median"] for row in (ours, theirs)]
    assert tokens[0] == pytest.approx(tokens[1]) == 98
    assert ours["peak_bytes"] > 1 << 20
    assert ours["pairs_per_second"] == pytest.approx(1 / ours["median"])
    assert 0 < ours["floor_seconds"] == ours["products"] < ours["recompute_floor_seconds"]
    assert ours["floor_ratio"] == ours["median"] / ours["floor_seconds"]
    assert ours["fill_seconds"] > 0
    assert theirs["time_ratio"] == theirs["peak_ratio"] == 1.0


class Ended:
    """A connection and a process that have ended, and their context."""

    exitcode = 3

    def Pipe(self):
        return self, self

    def Process(self, **_):
        return self

    def start(self):
        pass

    join = close = start

    def send(self, _):
        raise BrokenPipeError


def test_a_candidate_that_cannot_run_is_a_row_that_says_so(monkeypatch):
    import throughput

    for name, prefix in (("ended", "json:X"), ("missing", "no_such_package:X")):
        monkeypatch.setitem(throughput.TRAINERS, throughput.OURS, prefix)
        candidate = throughput.Candidate(name, {}, None, Ended())
        candidate.step(Progress())
        assert (
            candidate.row(None)["missing"]
            == {
                "ended": "failed: its process ended with code 3; see its error above",
                "missing": "no_such_package is not installed",
            }[name]
        )


def test_every_idea_is_switched_off_by_itself():
    import throughput

    full = throughput.ON_CUDA[throughput.OURS]
    for name, change in throughput.WITHOUT.items():
        row = throughput.ON_CUDA[f"{throughput.OURS}, without {name}"]
        assert row != full, name
        assert {key: value for key, value in row.items() if full.get(key, True) != value} == change


def test_products_of_a_layer_are_counted():
    import products

    text = SimpleNamespace(hidden_size=6, intermediate_size=10, num_key_value_heads=1, head_dim=3)
    found = [sum(2 * m * k * n for m, k, n in shapes) for shapes in products.layer_shapes(text, 5, 4, 2)]
    # Five rows meet the attention's linears, four the MLP's.
    linears = 5 * (2 * 6 * 6 + 2 * 6 * 3) + 4 * 3 * 6 * 10
    ends = 5 * (2 * (6 + 6) + 2 * (6 + 3)) + 4 * 3 * (6 + 10)
    # Forward and the gradient of the input take the weights once each; A and B also give their own gradients.
    assert found == [2 * linears, 2 * 2 * ends, 2 * linears + 2 * 2 * 2 * ends]


def test_a_floor_adds_up_its_products(monkeypatch):
    import products

    monkeypatch.setattr(products, "median_seconds", lambda step, device: step)
    monkeypatch.setattr(products, "products", lambda shapes, device, dtype: sum(m * k * n for m, k, n in shapes))
    monkeypatch.setattr(products, "attention_seconds", lambda *given: (10, 25) if given[-1] else (100, 250))
    text = SimpleNamespace(hidden_size=2, intermediate_size=2, num_key_value_heads=1, head_dim=2)
    vars(text).update(num_hidden_layers=3, vocab_size=7)
    vision = SimpleNamespace(hidden_size=1, intermediate_size=1, image_size=2, patch_size=1, num_hidden_layers=2)
    packing = SimpleNamespace(input_ids=range(5), targets=range(4), tail_rows=range(3))
    config = SimpleNamespace(text_config=text, vision_config=vision)
    base, low_rank, head = 7 * 5 * 4, 7 * 2 * 5 * 2, 4 * 2 * 7
    layer = base + low_rank + 100 + base + 2 * low_rank + 250
    # Of the last layer the MLP's three linears meet three rows, and the attention has fewer queries.
    last_base, last_low_rank = (4 * 5 + 3 * 3) * 4, 2 * (4 * 5 + 3 * 3) * 2
    last = last_base + last_low_rank + 10 + last_base + 2 * last_low_rank + 25
    for live_reference, images in ((False, 0), (True, 2)):
        how = {"rank": 1, "live_reference": live_reference, "live_images": images, "device": "cpu", "dtype": None}
        expected = 2 * layer + last + 2 * head
        expected += 2 * (base + 100) + last_base + 10 + head if live_reference else 0
        expected += 2 * 6 * images * 5  # two layers of six products over the patches and the class token
        found = products.floor_seconds(config, [packing], **how)
        recomputed = 2 * (base + low_rank + 100) + last_base + last_low_rank + 10
        assert found == (expected, expected + recomputed)


def test_the_projection_scales_products_by_rate_and_the_rest_by_bandwidth(monkeypatch):
    import throughput

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    rows = {"a": {"median": 2.0, "products": 1.5}, "b": {"median": 1.0}}
    throughput.project(rows, SimpleNamespace(card="a40"))
    here, there = throughput.CARDS["h200"], throughput.CARDS["a40"]
    assert rows["a"]["projected"] == pytest.approx(
        1.5 * here.rate / there.rate + 0.5 * here.bandwidth / there.bandwidth
    )
    assert rows["b"] == {"median": 1.0}


@pytest.mark.parametrize("lengths", ["paper", "even"])
def test_pairs_have_the_lengths_that_are_asked_for(lengths):
    import models

    options = SimpleNamespace(pairs=3, steps=4, lengths=lengths, response_tokens=100)
    found = models.response_lengths(options, 15)
    assert found == models.response_lengths(options, 15)
    assert all(chosen != rejected for chosen, rejected in found) or lengths == "paper"
    mean = sum(map(sum, found)) / 30
    # 57,906 * 220 + 55,445 * 65 + 54,359 * 130 over all; or 70 to 130
    assert mean == pytest.approx(140 if lengths == "paper" else 100, rel=0.1)


def test_a_model_in_4_bits_is_made_one_linear_at_a_time(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    import models
    import throughput

    options = throughput.parse([*TOY, "--base=nf4"])
    dense = models.make_llava(throughput.parse(TOY))[0]
    model, _ = models.make_llava(options)
    quantised = [name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(quantised) == 2 * 7
    assert all("language_model" in name for name in quantised)
    assert model.is_loaded_in_4bit
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    for (name, ours), (_, expected) in zip(model.named_buffers(), dense.named_buffers(), strict=True):
        assert torch.equal(ours, expected), name
    weight = model.get_submodule(quantised[0]).weight
    values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert values.shape == (64, 64)
    assert values.std().item() == pytest.approx(0.02, rel=0.1)
