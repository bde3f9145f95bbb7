import random

import pytest
from PIL import Image
from tiny_families import REFUSED

from bpo_fast.answers.generate import GenerationSettings, generate
from bpo_fast.bootstrap.image_weakened import ImageWeakened
from bpo_fast.bootstrap.maker import Made, draw
from bpo_fast.bootstrap.self_generated import SelfGenerated
from bpo_fast.bootstrap.sft import ChosenOnly
from bpo_fast.data.annotations import Annotation
from bpo_fast.models.weaken import weaken

SAMPLES = [
    Annotation(0, "a", "0.png", "w1 w2 w3", "w4"),
    Annotation(1, "b", "1.png", "w5", "w6", history=(("w7", "w8 w9"),)),
]
IMAGES = [Image.frombytes("RGB", (16, 16), random.Random(n).randbytes(768)) for n in range(2)]
SAMPLED = GenerationSettings(6, do_sample=True)


def by_hand(model, processor, sample, image, step, decoding, seed, target="features"):
    """A sample's answer at one step, alone, by the hooks of `weaken`."""
    with weaken(model, step, target=target, seed=seed, sample_ids=[sample.sample_id]):
        (response,) = generate(model, processor, [image], [sample.prompt], decoding, seeds=[draw(seed, sample, step)])
    return response


@pytest.mark.parametrize("target", ["features", "pixels", "projected"])
@pytest.mark.parametrize("decoding", [GenerationSettings(6), SAMPLED])
def test_each_step_answers_as_a_weakened_image_alone_does(tiny_llava, target, decoding):
    made = ImageWeakened(target, (300, 900), seed=3, decoding=decoding).make(*tiny_llava, SAMPLES, IMAGES)
    for sample, image, responses in zip(SAMPLES, IMAGES, made, strict=True):
        for step, response in zip((300, 900), responses, strict=True):
            expected = by_hand(*tiny_llava, sample, image, step, decoding, 3, target)
            assert response == Made(expected.text, expected.truncated, str(step), details={"step": step})


def test_one_step_of_several_is_what_it_is_alone(tiny_llava):
    several = ImageWeakened(steps=[300, 900], decoding=SAMPLED).make(*tiny_llava, SAMPLES, IMAGES)
    alone = ImageWeakened(steps=900, decoding=SAMPLED).make(*tiny_llava, SAMPLES, IMAGES)
    assert [each.rejected for (_, each) in several] == [each.rejected for (each,) in alone]
    assert [each.variant for (each,) in alone] == ["", ""]


@pytest.mark.parametrize("target", ["features", "projected", "pixels"])
def test_a_model_that_the_noise_covers_is_taken(tiny_llava, target):
    ImageWeakened(target).check(*tiny_llava)


@pytest.mark.parametrize("target", ["features", "projected"])
def test_an_image_that_reaches_the_decoder_past_the_noise_is_refused(target):
    """Qwen3-VL adds features of earlier layers of its vision tower to hidden states of its decoder."""
    model, processor = REFUSED["Qwen3-VL"][0]()
    message = "model: found Qwen3VLForConditionalGeneration, whose answers depend on the image past the noise on its"
    with pytest.raises(ValueError, match=message):
        ImageWeakened(target).check(model, processor)
    ImageWeakened("pixels").check(model, processor)
    model, processor = REFUSED["Qwen2-VL"][0]()
    ImageWeakened(target).check(model, processor)


def test_a_leak_in_any_model_is_found(tiny_llava, monkeypatch):
    model, processor = tiny_llava
    seen = model.model.get_image_features

    def leaking(pixel_values, **options):
        output = seen(pixel_values=pixel_values, **options)
        output.pooler_output[0] = output.pooler_output[0] + pixel_values[0, 0, 0, 0]
        return output

    monkeypatch.setattr(model.model, "get_image_features", leaking)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration, whose answers depend on the image past"):
        ImageWeakened().check(model, processor)


def test_self_generated_is_seeded_by_the_sample(tiny_llava):
    kind = SelfGenerated(seed=5, decoding=SAMPLED)
    made = kind.make(*tiny_llava, SAMPLES, IMAGES)
    assert kind.make(*tiny_llava, SAMPLES[::-1], IMAGES[::-1]) == made[::-1]
    for sample, image, (response,) in zip(SAMPLES, IMAGES, made, strict=True):
        (expected,) = generate(*tiny_llava, [image], [sample.prompt], SAMPLED, seeds=[draw(5, sample)])
        assert response == Made(expected.text, expected.truncated)


def test_the_sft_view_has_nothing_rejected():
    assert ChosenOnly().make(None, None, SAMPLES, [None, None]) == [[Made(None)], [Made(None)]]


def test_the_defaults_are_the_papers_and_settings_say_what_decides():
    assert ImageWeakened(steps=[500, 900]).settings() == {
        "target": "features",
        "steps": [500, 900],
        "schedule": "sigmoid",
        "seed": 0,
        "max_new_tokens": 512,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "image"}, "noise_target: found 'image', expected one of features, pixels, projected"),
        ({"steps": []}, r"noise_step: found \[\], expected one step or more, each once"),
        ({"steps": [5, 5]}, r"noise_step: found \[5, 5\], expected one step or more, each once"),
        ({"steps": 1000}, "noise_step: found 1000, expected a step from 0 to 999"),
        ({"steps": [True]}, "noise_step: found True, expected a step from 0 to 999"),
        ({"schedule": "exp"}, "schedule: found 'exp', expected one of sigmoid, linear, cosine"),
        ({"seed": 2**63}, f"seed: found {2**63}, expected a whole number from"),
    ],
)
def test_mistakes_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        ImageWeakened(**options)
