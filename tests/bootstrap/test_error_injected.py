import json
from collections import Counter

import pytest
from tiny_models import SPECIAL, make_llava

from bpo_fast.answers.generate import GenerationSettings, Response, generate_text
from bpo_fast.bootstrap import error_injected
from bpo_fast.bootstrap.error_injected import ErrorInjected
from bpo_fast.bootstrap.maker import draw
from bpo_fast.bootstrap.rewriting import read_template
from bpo_fast.data import Annotation

SAMPLES = [Annotation(n, f"r{n}", f"{n}.png", f"w{n}", f"w3 w{n}") for n in range(4)]
NO_IMAGES = [None] * len(SAMPLES)
SAMPLING = GenerationSettings(6, do_sample=True, temperature=2.0)


@pytest.fixture
def template(tmp_path):
    """One of words that the tiny model knows."""
    path = tmp_path / "template.json"
    content = {"version": "1", "prompt": "w1 {error} {question} {response}", "errors": {"w7": {}, "w8": {}, "w9": {}}}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def tiny_llava(tiny_llava):
    """The tiny LLaVA, kept from ending or leaving out a response."""
    tiny_llava[0].lm_head.weight.data[: len(SPECIAL)] = 0
    return tiny_llava


def test_responses_are_the_language_models_to_the_prompt_of_each_kind_of_error(tiny_llava, template):
    maker = ErrorInjected(errors=("w9", "w7"), template=template, seed=5, decoding=SAMPLING)
    made = maker.make(*tiny_llava, SAMPLES, NO_IMAGES)
    for sample, responses in zip(SAMPLES, made, strict=True):
        assert [response.variant for response in responses] == ["w9", "w7"]
        for response in responses:
            prompt = f"w1 {response.variant} {sample.question} {sample.answer}"
            seed = draw(5, sample, "error_injected", response.variant)
            assert generate_text(*tiny_llava, [prompt], SAMPLING, seeds=[seed]) == [Response(response.rejected, True)]
            assert response.truncated
            version = read_template(template).version
            assert response.details == {"error": response.variant, "template_version": version}


def test_what_a_sample_gets_does_not_depend_on_the_others(tiny_llava, template):
    maker = ErrorInjected(errors=("mixed", "mixed"), template=template, decoding=SAMPLING)
    whole = maker.make(*tiny_llava, SAMPLES, NO_IMAGES)
    assert len({response.rejected for responses in whole for response in responses}) > 4
    for batch in ([3], [2, 0], [1]):
        assert maker.make(*tiny_llava, [SAMPLES[n] for n in batch], NO_IMAGES[: len(batch)]) == [
            whole[n] for n in batch
        ]
    other = ErrorInjected(errors=("mixed", "mixed"), template=template, decoding=SAMPLING, seed=1)
    assert other.make(*tiny_llava, SAMPLES, NO_IMAGES) != whole


def test_the_kinds_of_mixed_errors_are_drawn_evenly_and_never_twice():
    samples = [Annotation(n, str(n), "1.png", "What?", "A cat.") for n in range(3000)]
    maker = ErrorInjected(errors=("mixed", "count", "mixed"))
    drawn = [maker.errors_of(sample) for sample in samples]
    assert all(errors[1] == "count" and len(set(errors)) == 3 for errors in drawn)
    for place in (0, 2):
        counts = Counter(errors[place] for errors in drawn)
        assert set(counts) == {"object", "attribute", "relation", "text"}
        assert all(abs(count - 750) < 4 * (3000 * 0.25 * 0.75) ** 0.5 for count in counts.values())
    assert drawn != [ErrorInjected(errors=maker.errors, seed=1).errors_of(sample) for sample in samples]


def test_a_failed_reply_is_kept_with_its_fault(tiny_llava, monkeypatch):
    replies = ["Two cats.", "", "Five people are waiting at the bus stop.", '"Three cats."']
    answered = [Response(reply, False) for reply in replies]
    monkeypatch.setattr(error_injected, "generate_text", lambda *_, **__: answered)
    made = ErrorInjected(errors="count").make(*tiny_llava, SAMPLES, NO_IMAGES)
    assert [response.rejected for (response,) in made] == ["Two cats.", "", "", "Three cats."]
    reason = "not_rewritten: a reply without a modified response, "
    assert [response.fault for (response,) in made] == ["", f"{reason}''", f"{reason}'{replies[2]}'", ""]
    assert {response.variant for (response,) in made} == {""}


def test_settings_say_what_decides_the_responses(template):
    maker = ErrorInjected(errors="w7", template=template, seed=3, decoding=SAMPLING)
    assert json.loads(json.dumps(maker.settings())) == {
        "errors": ["w7"],
        "template_version": read_template(template).version,
        "seed": 3,
        "server_model": None,
        "max_new_tokens": 6,
        "do_sample": True,
        "temperature": 2.0,
        "top_p": None,
    }
    assert (maker.kind, maker.needs_model, maker.needs_images, maker.needs_answer) == (
        "error_injected",
        True,
        False,
        True,
    )


def test_a_model_without_room_for_the_prompt_is_refused(processor, template):
    ErrorInjected(template=template).check(make_llava(max_position_embeddings=40), processor)
    with pytest.raises(
        ValueError, match=r"error_template: found a prompt of \d\d+ tokens, expected fewer than .* 40 pos"
    ):
        ErrorInjected().check(make_llava(max_position_embeddings=40), processor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"errors": "color"},
            "errors: found 'color', expected some of object, attribute, count, relation, text and mix",
        ),
        ({"errors": ("count", "count")}, "errors: found 'count' twice, expected each kind once"),
        ({"errors": ()}, "errors: found 0, expected 1 to 5, as many as there are kinds"),
        ({"errors": ("mixed",) * 6}, "errors: found 6, expected 1 to 5"),
        ({"seed": "a"}, "seed: found 'a', expected a whole number from"),
    ],
)
def test_mistakes_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        ErrorInjected(**options)
