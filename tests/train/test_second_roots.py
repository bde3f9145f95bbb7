"""Pairs with a second root, and weights of tokens, in training: against the model's own forward, text by text.

The plain form runs every response of every root by itself, unpacked, with the attention that the model was loaded
with; the noise comes from `weaken`, around that forward.
"""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_families import EXACT, make_examples
from tiny_models import make_llava, make_pairs, make_processor
from transformers import BatchFeature

from bpo_fast import BPOConfig, BPOTrainer
from bpo_fast.models.lora import adapter_disabled
from bpo_fast.models.packed_forward import image_features, unpacked_forward
from bpo_fast.models.prompt import answer_ids, encode, render
from bpo_fast.models.weaken import weaken
from bpo_fast.models.weakened_roots import Weakening, features_of_both_roots
from bpo_fast.train.check_pairs import check_pairs
from bpo_fast.train.collator import PreferenceCollator

LOGGED = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/weakened", "logps/weakened", "entropy")
CACHES = {"cache_image_features": True, "precompute_ref_log_probs": True}


def make_trainer(folder, pairs=None, model=None, processor=None, **options):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 7,
        "loss_type": "mdpo",
    } | options
    return BPOTrainer(
        model=model or make_llava(),
        args=BPOConfig(**settings),
        train_dataset=pairs or Dataset.from_list(make_pairs(12)),
        processing_class=processor or make_processor(),
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )


def train(folder, **options):
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trainer


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def responses_of(processor, example):
    """The rendered prompt and the token ids of both responses."""
    texts = [example["chosen"], example["rejected"]]
    prompt, answers = render(processor, example["prompt"], texts, num_images=len(example["images"]))
    return prompt, [answer_ids(processor, answer) for answer in answers]


def weighted(processor, examples, seed=0):
    """The same examples with random weights of their tokens; the second has none for its rejected response."""
    rng, found = random.Random(seed), []
    for number, example in enumerate(examples):
        _, ids = responses_of(processor, example)
        weights = [[rng.choice([0.0, 0.5, 1.0, 3.0]) for _ in each] for each in ids]
        given = {"chosen_token_weights": weights[0], "rejected_token_weights": None if number == 1 else weights[1]}
        found.append(example | given)
    return found


def log_prob(forward, processor, example, response):
    """Log-probs of the tokens of one response, the text by itself."""
    prompt, ids = responses_of(processor, example)
    made = encode(processor, [prompt], [example["images"]])
    answer = torch.tensor([ids[response]])
    made["input_ids"] = torch.cat([made["input_ids"], answer], 1)
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    inputs = {name: x for name, x in made.items() if name not in ("token_type_ids", "mm_token_type_ids")}
    logits = forward(**BatchFeature(inputs), use_cache=False).logits[0, -answer.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(1, answer[0, :, None])[:, 0]


def plain_loss(trainer, examples, ids):
    """The mean loss of some examples; `ids` are the noise ids of each one's feature maps."""
    model, processor, args = trainer.model, trainer.processing_class, trainer.args
    noise = {"target": args.noise_target, "schedule": args.noise_schedule, "seed": args.seed}
    losses = []
    for example, noise_ids in zip(examples, ids, strict=True):

        def ratio(response, step=None, example=example, noise_ids=noise_ids):
            weights = example.get(("chosen_token_weights", "rejected_token_weights")[response])
            how = {} if step is None else noise | {"sample_ids": noise_ids}
            with unpacked_forward(model.get_base_model()) as forward, weaken(model, step, **how):
                policy = log_prob(forward, processor, example, response)
                with torch.no_grad(), adapter_disabled(model):
                    reference = log_prob(forward, processor, example, response)
            return ((policy - reference) * (1.0 if weights is None else torch.tensor(weights))).sum()

        chosen, rejected = ratio(0), ratio(1)
        loss = -F.logsigmoid(args.beta * (chosen - rejected))
        if trainer.weakening is not None:
            weakened = ratio(0, args.noise_step)
            loss = loss - args.mdpo_conditional_weight * F.logsigmoid(args.beta * (chosen - weakened))
            loss = loss - args.mdpo_anchor_weight * F.logsigmoid(args.beta * chosen - args.mdpo_anchor)
        losses.append(loss)
    return sum(losses) / len(losses)


def gradients_of(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in trainer.model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize(
    ("family", "options", "weights"),
    [
        ("LLaVA over Llama", {"mdpo_conditional_weight": 0.5, "mdpo_anchor_weight": 2.0, "mdpo_anchor": 0.3}, False),
        ("LLaVA over Llama", {"noise_target": "pixels", "noise_schedule": "cosine"}, True),
        ("LLaVA over Llama", {"noise_target": "projected", "noise_step": 900}, False),
        ("LLaVA over Llama", {"loss_type": "sigmoid"}, True),
        ("InternVL", {"noise_target": "features", "token_budget": 120}, True),
        ("Idefics3", {"noise_target": "pixels"}, False),
    ],
)
def test_losses_and_gradients_are_those_of_the_models_own_forward(tmp_path, family, options, weights):
    model, processor = EXACT[family]()
    examples = make_examples(3)
    if weights:
        examples = weighted(processor, examples)
    trainer = make_trainer(tmp_path, Dataset.from_list(examples), model, processor, beta=0.5, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    trainer.model.eval()
    sequences = trainer.data_collator(examples)["sequences"]
    assert (len(sequences) > 1) == ("token_budget" in options)
    ids = []
    for example in examples:
        prompt, _ = responses_of(processor, example)
        num_maps = len(encode(processor, [prompt], [example["images"]])["pixel_values"].flatten(0, -4))
        (alone,) = trainer.data_collator([example])["sequences"]
        first = 0 if alone.noise_ids is None else alone.noise_ids.item()
        ids.append(list(range(first, first + num_maps)))
    ours = sum(trainer.compute_loss(trainer.model, {"sequence": sequence}) for sequence in sequences)
    found = gradients_of(trainer, ours)
    plain = plain_loss(trainer, examples, ids)
    expected = gradients_of(trainer, plain)
    assert abs(ours.item() - trainer.loss_config.responses_per_pair * math.log(2)) > 0.01  # not where it began
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    assert largest > 0.1
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= 1e-5 * max(1.0, largest), name


def test_the_first_step_is_three_times_ln_2_with_rewards_of_zero_and_losses_fall(tmp_path):
    pairs = Dataset.from_list(weighted(make_processor(), make_pairs(6)))
    trainer = train(tmp_path, pairs=pairs, max_steps=30, learning_rate=2e-2, noise_step=900)
    assert history(trainer, "loss")[0] == pytest.approx(3 * math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/weakened", "rewards/margins"):
        assert history(trainer, name)[0] == 0.0
    assert sum(history(trainer, "loss")[-4:]) / 4 < 1.5
    # What the image has to do with it is learned, too.
    assert history(trainer, "rewards/chosen")[-1] > history(trainer, "rewards/weakened")[-1] + 0.3


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A training with noise on what a cache can hold, and weights of tokens."""
    pairs = Dataset.from_list(weighted(make_processor(), make_pairs(12)))
    return pairs, train(tmp_path_factory.mktemp("live"), pairs=pairs, noise_target="projected", max_length=14)


@pytest.mark.parametrize(
    "options",
    [CACHES, CACHES | {"token_budget": 60, "dataloader_num_workers": 2}, {"token_budget": 60}],
    ids=["caches", "caches, budget and workers", "budget"],
)
def test_caches_and_a_token_budget_change_nothing(tmp_path, live, options):
    pairs, expected = live
    if "cache_image_features" in options:
        options = options | {"cache_dir": str(tmp_path / "cache")}
    found = train(tmp_path, pairs=pairs, noise_target="projected", max_length=14, **options)
    if "token_budget" in options:
        assert len(next(iter(found.get_train_dataloader()))["sequences"]) > 1
    for name in LOGGED:
        assert history(found, name) == pytest.approx(history(expected, name), abs=1e-4, rel=1e-5), name


def test_a_resumed_training_and_one_with_kept_log_probs_go_on_to_the_same_bits(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "precompute_ref_log_probs": True}
    options |= {"cache_dir": str(tmp_path / "cache"), "disable_dropout": False}
    train(tmp_path / "whole", **options)
    make_trainer(tmp_path / "again", **options).train(str(tmp_path / "whole" / "checkpoint-2"))
    whole, again = (
        load_file(tmp_path / name / "checkpoint-4" / "adapter_model.safetensors") for name in ("whole", "again")
    )
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_log_probs_kept_for_another_noise_are_never_used(tmp_path):
    kept = {"precompute_ref_log_probs": True, "cache_dir": str(tmp_path / "cache"), "max_steps": 1}
    pairs = Dataset.from_list(make_pairs(3))
    for change in ({}, {"noise_step": 499}, {"noise_schedule": "cosine"}, {"seed": 8}):
        trainer = train(tmp_path / "out", pairs=pairs, **kept, **change)
        assert history(trainer, "rewards/weakened") == [0.0], change


@pytest.mark.parametrize("target", ["features", "pixels", "projected"])
def test_the_noise_of_a_pair_is_the_same_in_any_batch(target):
    """Looked at where next to nothing is left of the image, whose features are rounded otherwise in another batch."""
    model, processor = EXACT["InternVL"]()
    weakening = Weakening(999, target, "cosine", 3)
    collator = PreferenceCollator(processor, image_token_id=model.config.image_token_id, weakening=weakening)
    examples = make_examples(4)

    def noised(batch):
        (sequence,) = collator(batch)["sequences"]
        features = features_of_both_roots(
            model, sequence.image_inputs, weakening, sequence.noise_ids, sequence.num_image_rows
        )
        clean, weak = features.chunk(2)
        torch.testing.assert_close(clean, image_features(model, sequence.image_inputs), rtol=0, atol=0)
        return dict(zip(sequence.noise_ids.tolist(), weak.split(list(sequence.num_image_rows)), strict=True))

    together, apart = noised(examples), {}
    for batch in ([examples[2], examples[0]], [examples[3]], [examples[1]]):
        apart |= noised(batch)
    assert together.keys() == apart.keys()
    assert len(together) == 4
    for number, weak in together.items():
        torch.testing.assert_close(apart[number], weak, rtol=1e-5, atol=1e-5)


def test_evaluation_weakens_alike_every_time(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    found = [trainer.evaluate(Dataset.from_list(make_pairs(5)))["eval_loss"] for _ in range(2)]
    assert found[0] == found[1] == pytest.approx(3 * math.log(2), abs=1e-6)
    rows = [entry["eval_logps/weakened"] for entry in trainer.state.log_history]
    assert rows[0] == rows[1] != trainer.state.log_history[0]["eval_logps/chosen"]


def test_tiles_that_are_put_together_are_refused_where_the_noise_goes_by_maps(tmp_path):
    pairs = Dataset.from_list(make_examples(3))

    def of_llava_next(target):
        model, processor = EXACT["LLaVA-NeXT"]()
        return train(tmp_path, pairs=pairs, model=model, processor=processor, noise_target=target, max_steps=1)

    for target in ("features", "pixels"):
        with pytest.raises(ValueError, match=f"^noise_target: found '{target}' for LlavaNext.*'projected'; set it"):
            of_llava_next(target)
    assert history(of_llava_next("projected"), "loss") == [pytest.approx(3 * math.log(2), abs=1e-6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_step": 1000}, "noise_step: found 1000, expected 0 to 999, the steps of the sigmoid schedule."),
        ({"noise_target": "image"}, "noise_target: found 'image', expected one of features, pixels, projected."),
        ({"noise_schedule": "flat"}, "schedule: found 'flat', expected one of sigmoid, linear, cosine."),
        (
            {"cache_image_features": True},
            "cache_image_features: found True with noise_target 'features', expected False, since features are kept "
            "behind the projector; set noise_target to 'projected', or leave the cache out.",
        ),
        (
            {"loss_type": "sigmoid", "noise_target": "pixels"},
            r"noise_target: found 'pixels' with loss_type \['sigmoid'\], expected None, since it weakens no image",
        ),
    ],
)
def test_noise_that_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        BPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **{"loss_type": "mdpo"} | options)


def of_tokens(example, **weights):
    return example | {f"{name}_token_weights": values for name, values in weights.items()}


def test_weights_lie_where_their_tokens_do_and_are_cut_with_them():
    processor, examples = make_processor(), make_pairs(2)
    (_, first), (_, second) = (responses_of(processor, example) for example in examples)
    weights = [list(map(float, range(start, start + len(ids)))) for start, ids in ((10, first[0]), (30, second[1]))]
    examples = [of_tokens(examples[0], chosen=weights[0]), of_tokens(examples[1], rejected=weights[1])]
    collator = PreferenceCollator(
        processor, image_token_id=processor.image_token_id, weakening=Weakening(500, "features", "sigmoid", 0)
    )
    (sequence,) = collator(examples)["sequences"]
    ones = [1.0] * max(map(len, (*first, *second)))
    expected = [*weights[0], *ones[: len(first[1])], *ones[: len(second[0])], *weights[1]]
    expected += [*weights[0], *ones[: len(second[0])]]  # of the second roots
    assert sequence.token_weights.tolist() == expected
    collator.max_length = sequence.packing.prefix_lengths[0] + 1
    (cut,) = collator(examples[:1])["sequences"]
    assert cut.token_weights.tolist() == [weights[0][0], 1.0, weights[0][0]]
    (plain,) = collator(make_pairs(1))["sequences"]
    assert plain.token_weights is None


def test_weights_and_images_that_do_not_fit_are_left_out_with_their_rows():
    processor, examples = make_processor(), make_pairs(5)
    counts = [[len(ids) for ids in responses_of(processor, example)[1]] for example in examples]
    examples[1] = of_tokens(examples[1], chosen=[1.0] * (counts[1][0] - 1), rejected=None)
    examples[2] = of_tokens(examples[2], chosen=None, rejected=[-0.5] * counts[2][1])
    examples[3] = of_tokens(examples[3], chosen="0.5", rejected=None)
    text = [{"role": "user", "content": [{"type": "text", "text": "w1"}]}]
    examples[4] = examples[4] | {"images": [], "prompt": text}
    weakening = Weakening(500, "features", "sigmoid", 0)
    collator = PreferenceCollator(processor, image_token_id=processor.image_token_id, weakening=weakening)
    found = {pair.number: pair.reason for pair in check_pairs(examples, collator)}
    assert found.keys() == {1, 2, 3, 4}
    assert found[1] == (
        f"chosen_token_weights: found {counts[1][0] - 1} weights, expected {counts[1][0]}, one for each token of the "
        "response, its end token included."
    )
    assert found[2] == "rejected_token_weights: found -0.5, expected finite numbers of at least 0."
    assert found[3].startswith("chosen_token_weights: found '0.5', expected ")
    assert found[4].startswith("images: found none in the prompt '<s> USER: w1 ")
    # A training on the chosen answers alone reads no weights.
    collator = PreferenceCollator(processor, image_token_id=processor.image_token_id, responses=("chosen",))
    assert not check_pairs(examples, collator)
