import pytest

from bpo_fast.evaluate.pope import says_yes, score_pope


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes, there is a dog.", True),
        ("No, there is no dog.", False),
        ("There is no dog. Yes.", False),
        ("There is a dog. No cat.", True),  # only the first sentence counts
        ("No", False),
        ("no,there is", True),  # the comma goes, and "nothere" is no "no"
        ("It is not here", False),
        ("NO", True),  # the rule knows three spellings
        ("I do n't know", True),
        ("Nothing", True),
        ("", True),
    ],
)
def test_rule(answer, expected):
    assert says_yes(answer) is expected


def test_score_by_hand():
    answers = ["Yes.", "Yes.", "Yes.", "No.", "No.", "No.", "Yes.", "No."]
    labels = ["yes", "yes", "no", "no", "no", "yes", "yes", "no"]
    score = score_pope(answers, labels)
    assert (score["tp"], score["fp"], score["tn"], score["fn"]) == (3, 1, 3, 1)
    assert score["accuracy"] == 6 / 8
    assert score["precision"] == 3 / 4
    assert score["recall"] == 3 / 4
    assert score["f1"] == pytest.approx(2 * 0.75 * 0.75 / 1.5)
    assert score["yes_ratio"] == 4 / 8
    assert score["num_questions"] == 8


def test_yes_ratio_is_of_the_answers_not_the_labels():
    assert score_pope(["Yes."] * 4, ["no"] * 3 + ["yes"])["yes_ratio"] == 1


def test_labels_are_read_in_whatever_case():
    answers = ["Yes.", "Yes.", "No.", "No."]
    assert score_pope(answers, ["Yes", " NO", "YES ", "no"]) == score_pope(answers, ["yes", "no", "yes", "no"])


def test_a_ratio_over_nothing_is_zero():
    score = score_pope(["No."], ["no"])
    assert (score["precision"], score["recall"], score["f1"], score["accuracy"]) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("answers", "labels", "sentence"),
    [
        (["Yes."], [], "labels: found 0 for 1 answers"),
        ([], [], "answers: found none"),
        (["Yes.", "No."], ["yes", "none"], "labels, record 1: found 'none', expected 'yes' or 'no'"),
        (["Yes."], [True], "labels, record 0: found True, expected 'yes' or 'no'"),
    ],
)
def test_mistakes_are_one_sentence(answers, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        score_pope(answers, labels)
