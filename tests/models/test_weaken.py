import pytest
import torch
from peft import LoraConfig, get_peft_model

from bpo_fast.bootstrap import weaken
from bpo_fast.ops.noise.add import add_noise
from bpo_fast.ops.noise.schedule import NoiseSchedule

STEP, SEED, IDS = 700, 3, [11, 5]


@pytest.fixture
def inputs(tiny_llava):
    """Two single-image prompts for the tiny LLaVA."""
    _, processor = tiny_llava
    generator = torch.Generator().manual_seed(0)
    ids = processor.tokenizer("USER: " + "<image> " * 4 + "w1 w2 ASSISTANT:", return_tensors="pt")["input_ids"]
    return {"input_ids": ids.repeat(2, 1), "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def noised(x):
    return add_noise(x.contiguous(), STEP, schedule=NoiseSchedule.sigmoid(), seed=SEED, sample_ids=torch.tensor(IDS))


def by_hand(model, inputs, target):
    """Logits of the model put together from its parts, with noise on the target."""
    core = model.model
    pixels = noised(inputs["pixel_values"]) if target == "pixels" else inputs["pixel_values"]
    features = core.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    projected = core.multi_modal_projector(noised(features) if target == "features" else features)
    if target == "projected":
        projected = noised(projected)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    is_image = inputs["input_ids"] == model.config.image_token_id
    embeds[is_image] = projected.reshape(-1, projected.shape[-1])
    return model.lm_head(core.language_model(inputs_embeds=embeds).last_hidden_state)


@pytest.mark.parametrize("target", ["features", "pixels", "projected"])
@torch.no_grad()
def test_noise_is_put_on_the_target_and_on_nothing_else(tiny_llava, inputs, target):
    model, _ = tiny_llava
    clean = model(**inputs).logits
    with weaken(model, STEP, target=target, seed=SEED, sample_ids=IDS):
        weakened = model(**inputs).logits
    torch.testing.assert_close(weakened, by_hand(model, inputs, target), atol=1e-4, rtol=1e-4)
    assert (weakened - clean).abs().max() > 1e-2
    assert torch.equal(model(**inputs).logits, clean)


@torch.no_grad()
def test_an_image_keeps_its_noise_in_any_batch(tiny_llava, inputs):
    model, _ = tiny_llava
    with weaken(model, STEP, seed=SEED, sample_ids=IDS):
        both = model(**inputs).logits
    with weaken(model, STEP, seed=SEED, sample_ids=IDS[1:]):
        alone = model(**{name: value[1:] for name, value in inputs.items()}).logits
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)
    with weaken(model, STEP, seed=SEED + 1, sample_ids=IDS):
        assert not torch.allclose(model(**inputs).logits, both, atol=1e-3)


@torch.no_grad()
def test_no_step_adds_no_noise(tiny_llava, inputs):
    model, _ = tiny_llava
    clean = model(**inputs).logits
    with weaken(model, None):
        assert torch.equal(model(**inputs).logits, clean)


@pytest.mark.parametrize("target", ["features", "pixels", "projected"])
@torch.no_grad()
def test_an_adapted_model_is_weakened_as_the_model_is(tiny_llava, inputs, target):
    model, _ = tiny_llava
    with weaken(model, STEP, target=target, seed=SEED, sample_ids=IDS):
        expected = model(**inputs).logits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with weaken(adapted, STEP, target=target, seed=SEED, sample_ids=IDS):
        assert torch.equal(adapted(**inputs).logits, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with the CUDA op built")
@pytest.mark.parametrize("target", ["features", "pixels", "projected"])
@torch.no_grad()
def test_a_gpu_sees_the_same_weakened_image(tiny_llava, inputs, target):
    model, _ = tiny_llava
    with weaken(model, STEP, target=target, seed=SEED, sample_ids=IDS):
        expected = model(**inputs).logits
    model.to("cuda")
    with weaken(model, STEP, target=target, seed=SEED, sample_ids=IDS):
        logits = model(**{name: value.to("cuda") for name, value in inputs.items()}).logits
    torch.testing.assert_close(logits.cpu(), expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_hooks_are_gone_after_an_error(tiny_llava, inputs):
    model, _ = tiny_llava
    clean = model(**inputs).logits
    message = "model: found 2 feature maps of 1 images, expected one each for noise on features"
    with pytest.raises(ValueError, match=message), weaken(model, STEP, sample_ids=[1]):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, clean)


@torch.no_grad()
def test_ids_are_a_list_or_a_tensor_of_whole_numbers(tiny_llava, inputs):
    model, _ = tiny_llava
    outputs = []
    for ids in (IDS, tuple(IDS), torch.tensor(IDS), torch.tensor(IDS, dtype=torch.int32)):
        with weaken(model, STEP, sample_ids=ids):
            outputs.append(model(**inputs).logits)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    for ids, error, message in [
        ([1.5, 2.0], TypeError, "sample_ids: found list, expected a list of ints or a tensor .B. of int64"),
        (
            torch.tensor([1.0, 2.0]),
            TypeError,
            "sample_ids: found float32 .2., expected a list of ints or a tensor .B.",
        ),
        ([True, False], TypeError, "sample_ids: found list, expected a list of ints"),
        ("11", TypeError, "sample_ids: found str, expected a list of ints"),
        (torch.tensor([[1, 2]]), ValueError, r"sample_ids: found int64 \[1, 2\], expected a list of ints or \[B\]"),
        ([0, 2**63], ValueError, f"sample_ids: found {2**63}, expected"),
    ]:
        with pytest.raises(error, match=message), weaken(model, STEP, sample_ids=ids):
            pass


@pytest.mark.parametrize("step", [True, 0.5, "500", torch.tensor([0.5, 1.0]), torch.tensor([True, False])])
def test_a_step_that_is_no_whole_number_is_refused(tiny_llava, step):
    message = r"step: found .*, expected an int or a tensor \[B\] of"
    with pytest.raises(TypeError, match=message), weaken(tiny_llava[0], step):
        pass


def test_mistakes_are_one_sentence(tiny_llava):
    model, _ = tiny_llava
    for options, message in [
        ({"target": "image"}, "target: found 'image', expected one of features, pixels, projected"),
        ({"schedule": "exp"}, "schedule: found 'exp', expected one of sigmoid, linear, cosine"),
    ]:
        with pytest.raises(ValueError, match=message), weaken(model, STEP, **options):
            pass
    text_model = model.model.language_model
    for target, message in [
        ("features", "model: found no projector in LlamaModel, expected one called .* set target to 'pixels'"),
        ("pixels", "model: found no vision tower in LlamaModel, expected a vision-language model"),
    ]:
        with pytest.raises(ValueError, match=message), weaken(text_model, 1, target=target):
            pass
