# ruff: noqa: RUF001 (answers in many scripts)
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpo_fast.answers.score import Score
from bpo_fast.bootstrap.filters import FILTERS, FilterOptions, Pair, check, normalised, repetition, similarity
from bpo_fast.bootstrap.maker import Made
from bpo_fast.data import Annotation

ALL = FilterOptions(max_similarity=0.9, drop_truncated=True, min_logp_gap=0.05)
CHOSEN = "A man in a green coat walks two dogs along the beach."


def dropped(rejected, chosen=CHOSEN, question="What is in the image?", options=ALL, **made):
    sample = Annotation(0, "a", "1.png", question, chosen)
    reason = check(sample, Made(rejected, **made), options)
    return reason and reason.partition(":")[0]


@pytest.mark.parametrize(
    ("name", "rejected"),
    [
        ("empty", ""),
        ("empty", " \n"),
        ("image_tag", "Look at <image>."),
        ("too_long", "word " * 351),
        ("identical", CHOSEN),
        ("identical", " a man in a green coat\nwalks two dogs along the beach"),
        ("similar", "A man in a green coat walks ten dogs along the beach."),
        ("repetition", "There is a cat. " * 12),
        ("repetition", "A dog runs along the water. The sky is blue." + " The sky is blue." * 9),
        ("repetition", "no " * 30),
        ("repetition", "海滩上有两只狗。" * 9),
        ("repetition", "На пляже две собаки. " * 9),
        ("repetition", "समुद्र तट पर दो कुत्ते हैं। " * 9),
        ("refusal", "I'm sorry, but I can't see the image you are talking about."),
        ("refusal", "As an AI language model, I do not look at pictures."),
        ("refusal", "I am unable to view or analyze images."),
        ("refusal", "I’m sorry, I cannot assist with that."),
        ("refusal", "It seems that no image was provided."),
        ("refusal", "You didn't upload an image."),
        ("refusal", "抱歉，我无法查看图片。"),
        ("refusal", "作为一个AI语言模型，我没有视觉。"),
        ("echo", "What is in the image? There is a horse."),
        ("echo", "what is in the image"),
        ("echo", "A horse. USER: And what else? ASSISTANT: A cow."),
        ("echo", "A horse.\n### Human: And what else?"),
    ],
)
def test_what_is_dropped(name, rejected):
    assert dropped(rejected) == name
    if name not in ("identical", "similar"):
        # A chosen response that a kind has picked is judged as well.
        sample = Annotation(0, "a", "1.png", "What is in the image?", CHOSEN)
        assert check(sample, Made("A horse by a fence.", chosen=rejected), ALL).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Yes.", "No."),
        ("2", "3"),
        ("-5", "5"),
        ("5%", "5"),
        ("3.5", "35"),
        ("C", "C++"),
        ("红色", "蓝色"),
        ("两只", "三只"),
        ("कि", "की"),  # two words of Hindi, parted by a vowel sign
        ("Да", "Нет"),
        ("ما هذا", "ما هذه"),
        ("แมว", "หมา"),
        ("🔴", "🔵"),
        ("0000000000", "0000000001"),
        ("Ha ha ha!", "Ho ho ho!"),
        ("The image of a text on a sign cannot be seen from here.", "I can see the image of a dog on the sign."),
        ("The sign says: No image provided.", "The sign says: Please upload an image."),
        ("The screen says: Cannot open the picture.", "The screen says: Unable to load the image."),
        ("It is not possible to tell who took the photo.", "I cannot tell who took the photo, but there is a dog."),
        ("The robot is shown as an AI assistant.", "The man is shown as a language teacher."),
        ("What is on the table is a cup.", "What stands there is a plate."),
        ("The left one. The right one is a copy of the left one.", "The first one, then the right one, the left one."),
        ("图中看不到照片。", "图中有一张照片。"),
    ],
)
def test_true_answers_are_kept(chosen, rejected):
    options = FilterOptions(max_similarity=0.97)
    for pair in ((chosen, rejected), (rejected, chosen)):
        assert dropped(pair[1], chosen=pair[0], options=options) is None


def test_a_long_honest_answer_with_recurring_phrases_is_kept():
    things = [("car", "red"), ("van", "grey"), ("bus", "yellow"), ("bicycle", "black"), ("tram", "white")]
    lines = [
        f"{n}. On the left side of the street there is a {color} {thing}." for n, (thing, color) in enumerate(things)
    ]
    assert dropped(" ".join(lines)) is None


def test_an_injected_error_of_one_word_is_kept_unless_asked_otherwise():
    rejected = CHOSEN.replace("two", "three")
    assert dropped(rejected, options=FilterOptions()) is None
    found = similarity(normalised(CHOSEN), normalised(rejected))
    # Of 52 and 54 characters "two" and "three" share their t alone.
    assert found == pytest.approx(2 * 50 / (52 + 54))
    assert dropped(rejected, options=FilterOptions(max_similarity=found)) is None
    assert dropped(rejected, options=FilterOptions(max_similarity=found - 1e-6)) == "similar"


def test_a_turn_that_is_text_of_the_image_is_kept_in_an_annotated_answer_alone():
    text = "The screen says USER: admin."
    assert dropped("The screen says nothing.", chosen=text) is None
    assert dropped(text, chosen="The screen says nothing.") == "echo"


def test_options_switch_filters_off():
    off = FilterOptions(None, None, None, drop_refusals=False, drop_echoes=False)
    for rejected in ("w " * 400, "There is a cat. " * 12, "I cannot see the image.", "What is in the image? A cat."):
        assert dropped(rejected, options=off) is None
    assert dropped("A horse.", truncated=True, options=off) is None
    assert dropped("A horse.", truncated=True) == "truncated"
    assert dropped("w " * 3, options=FilterOptions(max_response_words=2)) == "too_long"


def test_a_short_question_may_be_the_first_word_of_its_answer():
    assert dropped("Text on a sign", question="Text?") is None
    assert dropped("What is there", question="What is the") is None  # eleven bytes
    assert dropped("What is this book", question="What is this?") == "echo"
    assert dropped("What is this", question="What is thi") is None
    assert dropped("有几只猫？两只。", question="有几只猫？") == "echo"
    assert dropped("有", question="有？") is None


def test_log_probs_are_judged_once_they_are_known():
    sample, made = Annotation(0, "a", "1.png", "What is it?", "A cat."), Made("A dog.")
    near, far = (Score(-4.0, 4), Score(-6.2, 6)), (Score(-4.0, 4), Score(-4.0, 8))
    options = FilterOptions(min_logp_gap=0.05)
    assert check(sample, made, options) is None
    assert check(sample, made, options, scores=near) == "logp_gap: 0.0333 nats a token, under min_logp_gap=0.05"
    assert check(sample, made, options, scores=near[::-1]).startswith("logp_gap: ")
    assert check(sample, made, options, scores=far) is None
    assert check(sample, made, options, scores=far[::-1]) is None
    assert check(sample, made, FilterOptions(), scores=near) is None
    # What the texts say has been judged before.
    assert check(sample, Made(""), options, scores=far) is None


def test_a_kinds_own_fault_and_choice_count():
    sample = Annotation(0, "a", "1.png", "What is it?", "A cat.")
    assert check(sample, Made(None, fault="m3po_margin: 0.1"), ALL) == "m3po_margin: 0.1"
    assert check(sample, Made("A cat."), ALL).startswith("identical")
    assert check(sample, Made("A cat.", chosen="A red fox."), ALL) is None
    assert check(sample, Made("A red fox", chosen="A red fox."), ALL).startswith("identical")


def test_a_chosen_response_alone_is_judged_by_itself():
    assert dropped(None) is None
    assert dropped(None, chosen="") == "empty"
    assert dropped(None, chosen="There is a cat. " * 12) == "repetition"


def test_every_filter_is_in_the_docs():
    docs = (Path(__file__).parents[2] / "docs/bootstrap.md").read_text()
    assert all(f"`{name}`" in docs for name in FILTERS)


@given(st.text(max_size=80))
def test_a_text_is_identical_to_itself_with_space_around_it(text):
    assert FILTERS["identical"](Pair("", text, f" {text}\n"), ALL)
    assert 0 <= repetition(text) < 1


@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=20, max_size=60), st.integers(12, 20))
def test_every_loop_is_found(unit, times):
    assert repetition(f"{unit} " * times) > 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_response_words": 0}, "max_response_words: found 0, expected a whole number of at least 1."),
        ({"max_similarity": 1.1}, "max_similarity: found 1.1, expected a number from 0 to 1."),
        ({"max_repetition": -0.1}, "max_repetition: found -0.1, expected a number from 0 to 1."),
        ({"min_logp_gap": float("nan")}, "min_logp_gap: found nan, expected a number of at least 0."),
    ],
)
def test_options_out_of_range_are_a_sentence(options, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        FilterOptions(**options)
