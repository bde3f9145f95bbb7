"""The scripts of examples/, each run as written and held against what it replaces."""

import importlib.util
import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numerics import eager_token_logps
from trl import DPOTrainer

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "last_line"),
    [("plain_loop", "25 {'loss': 0.1"), ("trl_subclass", "step 8: TRL 0."), ("llava_trainer", "[0.6931, ")],
)
def test_a_script_runs(name, last_line, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith(last_line)


def test_the_plain_loop_separates_the_pairs():
    history = load("plain_loop").train(steps=20)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[-1]["loss"] < 0.3
    assert history[-1]["rewards/accuracies"] == 1.0
    assert history[-1]["logps/chosen"] > history[0]["logps/chosen"] + 3


def test_the_subclass_of_trls_trainer_has_its_history(tmp_path):
    example = load("trl_subclass")
    stock, ours = (example.train(trainer, str(tmp_path)) for trainer in (DPOTrainer, example.LinearDPOTrainer))
    assert len(ours) == 8
    for theirs, entry in zip(stock, ours, strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/chosen", "logps/rejected"):
            # Both sum log-probs to about -40 in float32.
            assert entry[name] == pytest.approx(theirs[name], rel=2e-5, abs=1e-3 if "logps" in name else 5e-5), name
    assert max(abs(entry["rewards/margins"]) for entry in stock) > 0.01


def test_the_llava_style_trainer_has_the_history_of_the_eager_loss(tmp_path):
    example = load("llava_trainer")

    class Eager(example.LlavaDPOTrainer):
        def preference_loss(self, policy_logits, ref_logits, labels):
            logps, ref_logps = (
                eager_token_logps(logits[:, :-1], labels[:, 1:]).sum(1) for logits in (policy_logits, ref_logits)
            )
            chosen, rejected = (logps - ref_logps).chunk(2)
            return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    ours, eager = (example.train(str(tmp_path), trainer) for trainer in (example.LlavaDPOTrainer, Eager))
    assert ours == pytest.approx(eager, abs=2e-5)
    assert ours[0] == pytest.approx(math.log(2), abs=1e-6)
    assert ours[-1] < ours[0] - 0.03


def test_the_image_features_take_the_place_of_the_image_token():
    example = load("llava_trainer")
    model = example.make_model().get_base_model()
    ids = torch.tensor([[1, example.IMAGE_TOKEN_INDEX, 5, 7], [1, 4, example.IMAGE_TOKEN_INDEX, 0]])
    labels, mask, images = ids.clone(), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), torch.randn(2, 3, 16, 16)
    embeds, spliced, spliced_mask = example.splice(model, ids, labels, mask, images)
    features = model.get_image_features(images, return_dict=True).pooler_output
    count = len(features[0])
    assert spliced.tolist() == [[1, *[-100] * count, 5, 7], [1, 4, *[-100] * count, 0]]
    assert spliced_mask.tolist() == [[1] * (3 + count), [1] * (2 + count) + [0]]
    assert torch.equal(embeds[0, 1 : 1 + count], features[0])
    assert torch.equal(embeds[1, 2 : 2 + count], features[1])
