"""What the page shows of a row, whatever made the row."""

import pytest

from bpo_fast.data.formats import preference_row
from bpo_fast.report.browse.records import ALONE, CUT, SAME, to_record


def answer(text):
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def test_a_row_of_a_bootstrap_is_shown_whole():
    row = preference_row(
        "coco/1.jpg",
        "What is this?",
        "A red cat.",
        "A blue cat on a mat.",
        id="17",
        rejected_type="error_injected",
        variant="color",
        source="llava",
        rejected_truncated=True,
        chosen_logp=-10.5,
        rejected_logp=-20.25,
        seed=3,
        model=None,
        details='{"error": "color", "tries": 2, "none": null}',
    )
    record = to_record(row, 0)
    assert (record.id, record.kind, record.variant, record.source) == ("17", "error_injected", "color", "llava")
    assert (record.words, record.gap, record.marks) == ((3, 6), 9.75, (CUT,))
    assert record.images == ["coco/1.jpg"]
    assert record.texts == {
        "turns": [["user", "What is this?"]],
        "chosen": "A red cat.",
        "rejected": "A blue cat on a mat.",
        "logps": [-10.5, -20.25],
        "fields": {"seed": "3", "error": "color", "tries": "2"},
    }


def test_texts_stand_for_messages_and_a_row_without_an_id_goes_by_its_number():
    record = to_record({"prompt": "What?", "chosen": "Yes.", "rejected": "Yes.", "id": None}, 12)
    assert (record.id, record.kind, record.marks, record.images) == ("12", "", (SAME,), [])
    assert record.texts["turns"] == [["user", "What?"]]


@pytest.mark.parametrize("rejected", [None, []])
def test_a_chosen_response_may_stand_alone(rejected):
    record = to_record({"prompt": "What?", "chosen": answer("A cat."), "rejected": rejected}, 0)
    assert (record.texts["rejected"], record.words, record.marks) == (None, (2, 0), (ALONE,))


def test_earlier_turns_are_kept_and_of_several_images_the_text_says_where_they_are():
    content = [
        {"type": "text", "text": "This "},
        {"type": "image", "text": None},
        {"type": "text", "text": "or that?"},
    ]
    prompt = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    prompt.append({"role": "user", "content": content})
    row = {"images": ["1.png", "2.png"], "prompt": prompt, "chosen": "This.", "rejected": "That."}
    assert to_record(row, 0).texts["turns"] == [
        ["user", "Hello."],
        ["assistant", "Hi."],
        ["user", "This [image] or that?"],
    ]
    assert to_record(row | {"images": ["1.png"]}, 0).texts["turns"][-1] == ["user", "This or that?"]


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf")])
def test_a_log_prob_that_is_no_number_leaves_the_gap_open(value):
    row = {"prompt": "", "chosen": "a", "rejected": "b", "chosen_logp": -1.0, "rejected_logp": value}
    record = to_record(row, 0)
    assert (record.gap, record.texts["logps"]) == (None, [-1.0, None])


def test_log_probs_of_the_reference_are_taken_by_the_names_that_trl_gives_them():
    row = {"prompt": "", "chosen": "a", "rejected": "b", "ref_chosen_logps": -1.0, "ref_rejected_logps": -3.0}
    record = to_record(row, 0)
    assert (record.gap, record.texts["fields"]) == (2.0, {})


def test_other_columns_are_shown_short_whatever_they_hold():
    row = {"prompt": "", "chosen": "a", "rejected": "b", "details": "{no JSON", "raw": {"bytes": b"1"}, "n": [1, 2]}
    fields = to_record(row | {"long": "x" * 2000}, 0).texts["fields"]
    assert fields["details"] == "{no JSON"
    assert fields["raw"] == '{"bytes": "<bytes>"}'
    assert fields["n"] == "[1, 2]"
    assert fields["long"] == "x" * 997 + "..."
