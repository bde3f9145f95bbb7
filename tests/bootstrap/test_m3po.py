import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_clip import save_clip
from tiny_models import SPECIAL, make_llava, make_processor

from bpo_fast.answers.generate import GenerationSettings, Response, generate
from bpo_fast.answers.score import Score, score_answers
from bpo_fast.bootstrap import bootstrap, m3po
from bpo_fast.bootstrap.m3po import M3PO, Candidate, choose, m3p_scores
from bpo_fast.bootstrap.maker import Made, draw
from bpo_fast.bootstrap.sft import ChosenOnly
from bpo_fast.data import Annotation
from bpo_fast.models.clip import load_clip

SAMPLES = [
    Annotation(0, "a", "0.png", "w1 w2 w3", "w4 w40"),
    Annotation(1, "b", "1.png", "w5", "w6 w60", history=(("w7", "w8 w9"),)),
]
IMAGES = [Image.frombytes("RGB", (16, 16), random.Random(n).randbytes(768)) for n in range(2)]
DECODING = GenerationSettings(6, do_sample=True)


def pool(*values):
    return [Candidate(f"answer {n}", *each) for n, each in enumerate(values)]


# alignment, confidence: mean 0.25 and -2, standard deviations 0.05 * sqrt(2) and 1 / sqrt(2)
BY_HAND = pool((0.35, -2.0), (0.30, -1.0), (0.25, -2.5), (0.20, -1.5), (0.15, -3.0))


def test_the_score_by_hand():
    root = 2**0.5
    alignments = [root, root / 2, 0, -root / 2, -root]
    confidences = [0, root, -root / 2, root / 2, -root]
    for weight in (0.0, 0.25, 1.0):
        expected = [weight * a + (1 - weight) * c for a, c in zip(alignments, confidences, strict=True)]
        assert m3p_scores(BY_HAND, weight) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weight", "margin", "expected"),
    [
        (1.0, 0.01, (0, 1)),  # the best fitting, against the most confident of the others
        (1.0, 0.06, (0, 3)),  # the second fits too well by now
        (1.0, 0.16, (0, 4)),
        (1.0, 0.21, (0, None)),
        (0.5, 0.01, (1, 3)),  # the confident one is preferred; better fitting ones are never dispreferred
        (0.5, 0.11, (1, 4)),
        (0.0, 0.01, (1, 3)),
    ],
)
def test_the_choice_by_hand(weight, margin, expected):
    assert choose(BY_HAND, m3p_scores(BY_HAND, weight), margin) == expected


def test_an_answer_that_fits_better_is_never_dispreferred():
    confident = pool((0.5, -3.0), (0.3, -0.5), (0.1, -4.0))
    assert choose(confident, m3p_scores(confident, 0.3), 0.01) == (1, 2)


def test_ties_are_broken_by_the_order():
    tied = pool((0.3, -1.0), (0.3, -1.0), (0.1, -2.0), (0.1, -2.0))
    assert choose(tied, m3p_scores(tied, 0.5), 0.01) == (0, 2)
    assert choose(tied, m3p_scores(tied, 0.5), 0.0) == (0, 1)
    same = pool(*[(0.2, -1.0)] * 3)
    assert m3p_scores(same, 0.5) == [0, 0, 0]
    assert choose(same, [0, 0, 0], 0.01) == (0, None)


def test_the_annotated_answer_is_preferred_or_left_out():
    annotated = [BY_HAND[4]._replace(annotated=True), *BY_HAND[:4]]
    assert choose(annotated, m3p_scores(annotated, 1.0), 0.16) == (1, None)
    annotated = [BY_HAND[0]._replace(annotated=True), *BY_HAND[1:]]
    assert choose(annotated, m3p_scores(annotated, 1.0), 0.06) == (0, 3)


VALUES = st.tuples(st.integers(-40, 40).map(lambda n: n / 100), st.integers(-60, -1).map(lambda n: n / 20))


@given(st.lists(VALUES, min_size=2, max_size=9, unique_by=(lambda v: v[0], lambda v: v[1])), st.randoms())
def test_a_permutation_of_the_pool_changes_nothing(values, rng):
    first = pool(*values)
    shuffled = rng.sample(first, len(first))
    for weight in (0.0, 0.3, 1.0):
        scores = m3p_scores(first, weight)
        assert dict(zip(shuffled, m3p_scores(shuffled, weight), strict=True)) == dict(zip(first, scores, strict=True))
        if len(set(scores)) < len(scores):
            continue  # a tie of the M3P-Score itself
        found = [
            [None if place is None else candidates[place].text for place in choose(candidates, scored, 0.05)]
            for candidates, scored in ((first, scores), (shuffled, m3p_scores(shuffled, weight)))
        ]
        assert found[0] == found[1]


@given(st.lists(VALUES, min_size=2, max_size=9), st.floats(0, 1), st.floats(0, 0.3))
def test_what_every_choice_holds(values, weight, margin):
    candidates = pool(*values)
    scores = m3p_scores(candidates, weight)
    best, wrong = choose(candidates, scores, margin)
    assert scores[best] == max(scores)
    fits = [c for c in candidates if c is not candidates[best]]
    fits = [c for c in fits if candidates[best].alignment - c.alignment >= margin]
    assert (wrong is None) == (not fits)
    if fits:
        assert candidates[wrong] in fits
        assert candidates[wrong].confidence == max(c.confidence for c in fits)


class FakeClip:
    """Fits a text by what it says of itself: "a cat 0.3"."""

    def alignments(self, image, texts):
        return [float(text.split()[-1]) for text in texts]


@pytest.fixture
def faked(monkeypatch):
    """make(texts, **options): what M3PO makes of these answers; a text ends with its confidence and alignment."""

    def make(texts, sample=SAMPLES[0], **options):
        answers = iter(texts)

        def score(*given):
            return [Score(4 * float(text.split()[-2]), 4) for text in given[-1]]

        monkeypatch.setattr(m3po, "generate", lambda *_, **__: [next(answers)])
        monkeypatch.setattr(m3po, "load_clip", lambda *_: FakeClip())
        monkeypatch.setattr(
            m3po, "score_answers", lambda *given: [Score(4 * float(t.split()[-2]), 4) for t in given[-1]]
        )
        maker = M3PO("clip", num_candidates=len(texts), **options)
        ((made,),) = maker.make(make_llava(), make_processor(), [sample], IMAGES[:1])
        return made

    return make


def answers(*texts):
    return [Response(text, False) for text in texts]


def test_a_pair_of_fake_scores(faked):
    texts = ["one cat -2.0 0.35", "two dogs -1.0 0.30", "no fish -2.5 0.25", "a bird -1.5 0.20", "five cows -3.0 0.15"]
    made = faked(answers(*texts), alignment_weight=0.5)
    root = 2**0.5
    assert (made.chosen, made.rejected, made.fault) == (texts[1], texts[3], "")
    assert dict(made.details) == pytest.approx(
        {
            "pool": 5,
            "chosen_is_annotated": False,
            "m3p_score_chosen": 0.75 * root,
            "m3p_score_rejected": 0.0,
            "alignment_chosen": 0.30,
            "alignment_rejected": 0.20,
            "confidence_chosen": -1.0,
            "confidence_rejected": -1.5,
        },
        abs=1e-12,
    )


def test_the_pool_leaves_out_what_is_cut_empty_or_said_before(faked):
    cut = Response("the best of all -0.1 0.9", True)
    first, again, other = "one cat sits on the mat -1.0 0.30", "One cat sits on the mat: -1.0 0.30!", "a dog -1.0 0.10"
    texts = [cut, *answers("", " ", "<image> -1.0 0.8", first, again, other)]
    made = faked(texts)
    assert (made.chosen, made.rejected, made.details["pool"]) == (first, other, 2)
    near = first.replace("mat", "mats")
    assert faked(answers(first, near, other)).details["pool"] == 2
    assert faked(answers(first, near, other), pool_similarity=1.0).details["pool"] == 3
    assert faked(answers(first, again, other), pool_similarity=1.0).chosen == first


@pytest.mark.parametrize(
    "unsound",
    ["a cat " * 20 + "-0.1 0.05", "As an AI language model, I cannot -0.1 0.05", "ASSISTANT: a cat -0.1 0.05"],
)
def test_what_is_confident_for_no_better_reason_than_its_form_is_not_dispreferred(faked, unsound):
    made = faked(answers(unsound, "one cat sits on the mat -1.0 0.30", "a dog -2.0 0.10"))
    assert (made.rejected, made.details["pool"]) == ("a dog -2.0 0.10", 2)


def test_a_sample_without_a_pair_says_why(faked):
    made = faked([Response("a cat -1.0 0.3", False), Response("a dog -1.0 0.3", True)])
    assert made == Made(
        None, fault="m3po_pool: 1 whole, sound and distinct of 2 sampled answers, where two are needed"
    )
    made = faked(answers("a cat -1.0 0.3", "five dogs -1.0 0.295"))
    assert made.fault == "m3po_margin: no answer that fits the image by 0.01 less than the preferred one, of 2"
    assert faked(answers("a cat -1.0 0.3", "five dogs -1.0 0.29"), margin=0.005).fault == ""


def test_the_annotated_answer_joins_the_pool_where_asked(faked):
    sample = replace(SAMPLES[0], answer="annotated -1.0 0.9")
    texts = answers("a cat -1.0 0.3", "five dogs -1.0 0.1")
    assert faked(texts, sample).chosen == "a cat -1.0 0.3"
    made = faked(texts, sample, include_annotation=True)
    assert (made.chosen, made.rejected) == (None, "a cat -1.0 0.3")
    assert made.details["chosen_is_annotated"]
    # One that repeats it is that one.
    made = faked([*texts, Response("Annotated: -1.0 0.9", False)], sample, include_annotation=True)
    assert (made.chosen, made.details["pool"]) == (None, 3)
    assert not M3PO("clip").needs_answer
    assert M3PO("clip", include_annotation=True).needs_answer


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return str(folder)


@pytest.fixture
def tiny_llava(tiny_llava):
    """The tiny LLaVA, whose responses all have words and an end."""
    model, processor = tiny_llava
    model.lm_head.weight.data[: len(SPECIAL)] = 0
    model.generation_config.eos_token_id = list(range(len(SPECIAL), 60))
    return model, processor


@pytest.mark.parametrize("include", [False, True])
def test_a_pair_of_real_models_is_that_of_the_parts_by_hand(tiny_llava, clip_folder, include):
    model, processor = tiny_llava
    maker = M3PO(clip_folder, 5, margin=0.0, include_annotation=include, seed=4, decoding=DECODING, pool_similarity=1)
    maker.check(model, processor)
    made = maker.make(model, processor, SAMPLES, IMAGES)
    clip = load_clip(clip_folder, model.device)
    for sample, image, (found,) in zip(SAMPLES, IMAGES, made, strict=True):
        seeds = [draw(4, sample, "m3po", k) for k in range(5)]
        drawn = [generate(model, processor, [image], [sample.prompt], DECODING, seeds=[seed])[0] for seed in seeds]
        texts = [sample.answer] * include + [response.text for response in drawn if not response.truncated]
        texts = list(dict.fromkeys(texts))
        assert len(texts) > 2
        scores = [score.mean for score in score_answers(model, processor, image, sample.prompt, texts)]
        candidates = [Candidate(*each) for each in zip(texts, clip.alignments(image, texts), scores, strict=True)]
        if include:
            candidates[0] = candidates[0]._replace(annotated=True)
        best, wrong = choose(candidates, m3p_scores(candidates, 0.5), 0.0)
        if wrong is None:
            assert found.fault.startswith("m3po_margin")
            continue
        assert found.rejected == texts[wrong]
        assert found.chosen == (None if include and best == 0 else texts[best])
        assert found.details["alignment_rejected"] == candidates[wrong].alignment
        assert found.details["confidence_chosen"] == candidates[best].confidence
    assert any(not each.fault for (each,) in made)


def test_a_sample_gets_the_same_in_any_batch_and_order(tiny_llava, clip_folder):
    maker = M3PO(clip_folder, 4, margin=0.0, decoding=DECODING)
    made = maker.make(*tiny_llava, SAMPLES, IMAGES)
    assert maker.make(*tiny_llava, SAMPLES[::-1], IMAGES[::-1]) == made[::-1]
    assert [maker.make(*tiny_llava, [s], [i])[0] for s, i in zip(SAMPLES, IMAGES, strict=True)] == made
    assert replace(maker, seed=1).make(*tiny_llava, SAMPLES, IMAGES) != made


def test_settings_say_what_decides(clip_folder, tmp_path):
    found = M3PO(clip_folder, decoding=DECODING).settings()
    assert found["alignment_model"]["path"] == clip_folder
    assert {name: found[name] for name in ("num_candidates", "alignment_weight", "margin", "include_annotation")} == {
        "num_candidates": 8,
        "alignment_weight": 0.5,
        "margin": 0.01,
        "include_annotation": False,
    }
    assert (found["max_new_tokens"], found["do_sample"], found["seed"]) == (6, True, 0)
    save_clip(tmp_path, seed=1)  # other weights in another folder
    other = M3PO(str(tmp_path)).settings()
    assert other["alignment_model"]["weights"] != found["alignment_model"]["weights"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alignment_model": None}, "alignment_model: found none, expected the path or name of a CLIP-like model"),
        ({"alignment_model": ""}, "alignment_model: found none"),
        ({"decoding": GenerationSettings()}, "do_sample: found False, expected True for m3po"),
        ({"num_candidates": 1}, "num_candidates: found 1, expected a whole number of at least 2"),
        ({"alignment_weight": 1.5}, "alignment_weight: found 1.5, expected a number from 0 to 1"),
        ({"margin": -0.1}, "margin: found -0.1, expected a number of at least 0"),
        ({"pool_similarity": 2}, "pool_similarity: found 2, expected a number from 0 to 1"),
        ({"seed": 2**63}, "seed: found"),
    ],
)
def test_options_out_of_range_are_a_sentence(options, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        M3PO(**{"alignment_model": "clip"} | options)


def test_a_run_writes_its_pairs_and_counts_what_gave_none(tiny_llava, clip_folder, tmp_path):
    records = []
    for sample, image in zip(SAMPLES, IMAGES, strict=True):
        image.save(tmp_path / sample.image)
        turns = [{"from": "human", "value": f"<image>\n{sample.question}"}, {"from": "gpt", "value": "w4 w40"}]
        records.append({"id": sample.id, "image": sample.image, "conversations": turns})
    found = {}
    for margin in (0.0, 2.0):  # opposite cosines alone are so far apart
        for batch_size in (1, 4):
            out = tmp_path / f"{margin} {batch_size}"
            maker = M3PO(clip_folder, 5, margin=margin, seed=4, decoding=DECODING)
            options = {"kinds": [maker, ChosenOnly()], "batch_size": batch_size}
            pairs = bootstrap(*tiny_llava, records, tmp_path, out, **options)
            found[margin, batch_size] = pairs.to_list(), (out / "skipped.jsonl").read_text()
        assert found[margin, 1] == found[margin, 4]
    pairs, skipped = found[0.0, 1]
    chosen = [pair for pair in pairs if pair["rejected_type"] == "m3po"]
    assert chosen
    for pair in chosen:
        details = json.loads(pair["details"])
        assert pair["chosen"] != pair["rejected"]
        assert pair["chosen"][0]["content"][0]["text"] != "w4 w40"
        assert details["alignment_chosen"] >= details["alignment_rejected"]
        assert json.loads(pair["decoding"])["do_sample"] is True
    causes = [json.loads(line)["cause"] for line in skipped.splitlines()]
    assert len(chosen) + len(causes) == 2
    assert {json.loads(line)["cause"] for line in found[2.0, 1][1].splitlines()} == {"m3po_margin"}
