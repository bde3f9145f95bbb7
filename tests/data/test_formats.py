import json

import pytest

from bpo_fast.data.formats import preference_row, to_preference_rows

EXPECTED = preference_row("1.png", "What?", "good", "bad", id="7")
TEXTS = {"question": "What?", "chosen": "good", "rejected": "bad"}


def turns(answer):
    return [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]


@pytest.mark.parametrize(
    "row",
    [
        EXPECTED,
        {"image": "1.png", **TEXTS, "id": 7},
        {"image": "1.png", **TEXTS, "idx": 7, "origin_dataset": "x"},
        {"image_path": "1.png", "text": json.dumps(TEXTS), "idx": 7},
        {"image": "1.png", "text": json.dumps(TEXTS), "idx": 7},
        {"id": 7, "image": "1.png", "conversations": turns("good"), "rejected_conversations": turns("bad")},
    ],
    ids=["trl", "rlaif-v", "rlaif-v-idx", "rlhf-v", "rlhf-v-image", "povid"],
)
def test_one_pair_a_row(row):
    assert to_preference_rows(row, 7) == [EXPECTED]


def test_bpo_gives_a_pair_for_each_two_unequal_scores():
    completions = [
        {"score": 0, "response": "invented", "type": "llm-hal"},
        {"score": 1, "response": "good", "type": "gt"},
        {"score": 0, "response": "prior", "type": "mllm-hal"},
    ]
    pairs = to_preference_rows({"prompt": "<img> What?", "image": "1.png", "completions": completions}, 3)
    assert pairs == [
        preference_row("1.png", "What?", "good", "invented", id="3", rejected_type="llm-hal"),
        preference_row("1.png", "What?", "good", "prior", id="3", rejected_type="mllm-hal"),
    ]
    assert to_preference_rows({"prompt": "What?", "image": "1.png", "completions": completions[:1]}, 0) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "it is a str, expected an object"),
        ({"image": "1.png", "answer": "x"}, "it has the keys image, answer, which are those of no known format"),
        ({"image": "1.png", "text": "{"}, "Expecting"),
        ({"image": "1.png", "text": "{}"}, r"it has image, text but not all of their parts \(KeyError"),
        ({"image": "a", "prompt": "b", "completions": [{}, {}]}, r"not all of their parts \(KeyError\('score'\)\)"),
        ({"image": "a", "conversations": [], "rejected_conversations": []}, r"not all of their parts \(IndexError"),
    ],
)
def test_rows_of_no_format(row, message):
    with pytest.raises(ValueError, match=message):
        to_preference_rows(row, 0)
