"""Yes/no questions about objects, as POPE scores them (Li et al., arXiv 2305.10355)."""

from collections.abc import Sequence

_NO = {"No", "no", "not"}


def says_yes(answer: str) -> bool:
    """POPE's reading of an answer: no if its first sentence has the word "No", "no" or "not", otherwise yes.

    >>> says_yes("Yes, there is a dog. It is not small."), says_yes("There is not, I think."), says_yes("NO")
    (True, False, True)
    """
    first_sentence = answer.split(".")[0].replace(",", "")
    return _NO.isdisjoint(first_sentence.split())


def check_labels(labels: Sequence[str]) -> None:
    """Refuse labels that `score_pope` cannot read.

    Raises:
        ValueError: a label is neither "yes" nor "no", in whatever case.
    """
    for number, label in enumerate(labels):
        if not isinstance(label, str) or label.strip().lower() not in ("yes", "no"):
            raise ValueError(f"labels, record {number}: found {label!r}, expected 'yes' or 'no'.")


def score_pope(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Scores of yes/no answers, "yes" being the positive class.

    Args:
        answers: N answers in free text.
        labels: for each, "yes" or "no", in whatever case.

    Returns:
        `accuracy`, `precision`, `recall`, `f1` and `yes_ratio` (share of the *answers* that say yes), all fractions,
        and the counts `num_questions`, `tp`, `fp`, `tn`, `fn`. A ratio over nothing is 0.

    Raises:
        ValueError: lengths differ, there is no question, or a label is neither "yes" nor "no".

    Example:

    >>> score = score_pope(["Yes.", "Yes.", "No.", "Yes."], ["yes", "no", "no", "yes"])
    >>> score["accuracy"], score["precision"], score["recall"], score["yes_ratio"]
    (0.75, 0.6666666666666666, 1.0, 0.75)
    """
    if len(answers) != len(labels):
        raise ValueError(f"labels: found {len(labels)} for {len(answers)} answers, expected as many.")
    if not answers:
        raise ValueError("answers: found none, expected at least one.")
    check_labels(labels)
    said = [says_yes(answer) for answer in answers]
    truth = [label.strip().lower() == "yes" for label in labels]
    pairs = list(zip(said, truth, strict=True))
    tp, fp = pairs.count((True, True)), pairs.count((True, False))
    tn, fn = pairs.count((False, False)), pairs.count((False, True))
    return {
        "accuracy": (tp + tn) / len(pairs),
        "precision": tp / max(tp + fp, 1),
        "recall": tp / max(tp + fn, 1),
        "f1": 2 * tp / max(2 * tp + fp + fn, 1),
        "yes_ratio": (tp + fp) / len(pairs),
        "num_questions": len(pairs),
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
    }
