"""The pairs that a plan is made for."""

import pytest

from bpo_fast.plan.lengths import PAPER_MIX, LengthMix, groups_of


def test_answers_have_the_mean_of_the_mix():
    for count in (1, 4, 32):
        pairs = PAPER_MIX.pairs(count)
        mean = sum(chosen + rejected for _, chosen, rejected in pairs) / (2 * count)
        expected = (57906 * 220 + 55445 * 65 + 54359 * 130) / (57906 + 55445 + 54359)
        assert len(pairs) == count
        assert mean == pytest.approx(expected, abs=1)


def test_lengths_are_quantiles_of_the_log_normal():
    mix = LengthMix("", prompt=7, parts=((1, 100),), spread=0.5, ratio=1.0)
    lengths = [chosen for _, chosen, _ in mix.pairs(1001)]
    # exp(mu) with the mean exp(mu + spread^2 / 2), and the quartiles of the normal.
    median = 100 / 2.718281828**0.125
    assert lengths[500] == pytest.approx(median, rel=0.01)
    assert lengths[750] == pytest.approx(median * 2.718281828 ** (0.5 * 0.6745), rel=0.01)
    assert all(prompt == 7 for prompt, _, _ in mix.pairs(3))


def test_either_answer_is_the_longer_one_in_turn():
    pairs = PAPER_MIX.pairs(4)
    assert [chosen > rejected for _, chosen, rejected in pairs] == [True, False, True, False]
    assert all(max(pair[1:]) / min(pair[1:]) == pytest.approx(PAPER_MIX.ratio, rel=0.05) for pair in pairs)


def test_groups_have_the_image_in_their_prefix():
    (group,) = groups_of([(55, 10, 20)], image_tokens=576)
    assert len(group.prefix) == 631
    assert [len(branch) for branch in group.branches] == [10, 20]
