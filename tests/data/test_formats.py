import json

import pytest

from bpo_fast.data.formats import preference_row, to_pairs

COLUMNS = ("images", "prompt", "chosen", "rejected")
EXPECTED = preference_row("1.png", "What?", "good", "bad", id="7")
TEXTS = {"question": "What?", "chosen": "good", "rejected": "bad"}


def turns(answer):
    return [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]


@pytest.mark.parametrize(
    "record",
    [
        EXPECTED,
        {"images": ["1.png"], "prompt": "What?", "chosen": "good", "rejected": "bad", "id": "7"},
        {"image": "1.png", **TEXTS, "id": 7},
        {"image": "1.png", **TEXTS, "id": None},
        {"image": "1.png", **TEXTS, "idx": 7, "origin_dataset": "x"},
        {"image_path": "1.png", "text": json.dumps(TEXTS), "idx": 7},
        {"image": "1.png", "text": json.dumps(TEXTS), "idx": 7},
        {"id": 7, "image": "1.png", "conversations": turns("good"), "rejected_conversations": turns("bad")},
    ],
    ids=["trl", "trl-plain", "rlaif-v", "rlaif-v-null", "rlaif-v-idx", "rlhf-v", "rlhf-v-image", "povid"],
)
def test_one_pair_a_record(record):
    assert to_pairs(record, 7) == [EXPECTED]


def test_bpo_gives_a_pair_for_each_two_unequal_scores():
    completions = [
        {"score": 0, "response": "invented", "type": "llm-hal"},
        {"score": 1, "response": "good", "type": "gt"},
        {"score": 0, "response": "prior", "type": "mllm-hal"},
    ]
    pairs = to_pairs({"prompt": "<img> What?", "image": "1.png", "completions": completions}, 3)
    assert pairs == [
        preference_row("1.png", "What?", "good", "invented", id="3", rejected_type="llm-hal"),
        preference_row("1.png", "What?", "good", "prior", id="3", rejected_type="mllm-hal"),
    ]
    assert to_pairs({"prompt": "What?", "image": "1.png", "completions": completions[:1]}, 0) == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "found a str, expected an object"),
        (
            {"image": "1.png", "answer": "x"},
            r"found the keys image, answer, expected those of a known format \(.*TRL, BPO, RLAIF-V, POVID, RLHF-V",
        ),
        (dict.fromkeys(COLUMNS, "x"), "found images 'x', expected a list of paths"),
        ({"image": None, **TEXTS}, "found the image None, expected a path"),
        ({"image": ["1.png"], **TEXTS}, r"found the image \['1.png'\], expected a path"),
        ({"image": "1.png", **TEXTS, "chosen": None}, "found the text None, expected one that a file takes"),
        (
            {"image": "1.png", **TEXTS, "question": None},
            r"with a fault inside \(AttributeError.*, expected those of RLA",
        ),
        (
            {"image": "1.png", **TEXTS, "rejected": "half \ud83d"},
            r"found the text 'half \\ud83d', expected one that a",
        ),
        ({"image": "1.png", "text": "{"}, r"found image, text with a fault inside \(JSONDecodeError.* of RLHF-V"),
        (
            {"image": "1.png", "text": "{}"},
            r"with a fault inside \(KeyError\('question'\)\), expected those of RLHF-V",
        ),
        ({"image": "a", "prompt": "b", "completions": [{}, {}]}, r"\(KeyError\('score'\)\), expected those of BPO"),
        (
            {"image": "a", "conversations": [], "rejected_conversations": []},
            r"\(IndexError.*, expected those of POVID",
        ),
    ],
)
def test_records_of_no_format(record, message):
    with pytest.raises(ValueError, match=message):
        to_pairs(record, 0)
