import pytest
import torch
from transformers import TopPLogitsWarper

from bpo_fast.answers.sampling import Choice, GenerationSettings

ROWS = torch.arange(4)


def choose(logits, seeds=range(4), place=0, **options):
    settings = GenerationSettings(8, do_sample=True, **options)
    return Choice(settings, seeds, torch.device("cpu"))(logits, ROWS, place)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_the_nucleus_is_that_of_transformers(top_p):
    logits = 3 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    kept = TopPLogitsWarper(top_p)(None, logits) > -torch.inf
    settings = GenerationSettings(1, do_sample=True, top_p=top_p)
    many = 4000
    choice = Choice(settings, range(many), torch.device("cpu"))
    tokens, _ = choice(logits.expand(many, -1), torch.arange(many), 0)
    assert set(tokens.tolist()) <= set(kept[0].nonzero().flatten().tolist())
    likely = (logits.softmax(-1) * kept)[0]
    expected = likely / likely.sum()
    found = torch.bincount(tokens, minlength=50) / many
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / many).sqrt() + 1e-3).all()


def test_a_row_draws_by_its_seed_and_place_alone():
    logits = torch.zeros(4, 100)
    first, _ = choose(logits, seeds=[1, 2, 3, 4])
    again, _ = choose(logits, seeds=[4, 2, 9, 1])
    assert first.tolist()[3] == again.tolist()[0]
    assert first.tolist()[1] == again.tolist()[1]
    assert first.tolist() != choose(logits, seeds=[1, 2, 3, 4], place=1)[0].tolist()


def test_greedy_is_unsure_of_level_tokens_only():
    logits = torch.tensor([[5.0, 5.0 - 1e-5, 0.0], [5.0, 4.9, 0.0], [50.0, 49.998, 0.0], [-1.0, 0.0, torch.nan]])
    choice = Choice(GenerationSettings(8), [], torch.device("cpu"))
    assert choice(logits, ROWS, 0)[1].tolist() == [False, True, False, True]
    assert choice(logits.bfloat16(), ROWS, 0)[1].all()


def test_a_draw_is_unsure_at_the_border_of_two_tokens():
    settings = GenerationSettings(8, do_sample=True)
    choice = Choice(settings, range(4), torch.device("cpu"))
    at = choice.uniform[:, 0]
    for distance, sure in ((1e-6, False), (1e-2, True)):
        for side in (-1, 1):
            border = (at + side * distance).clamp(0.02, 0.98)
            logits = torch.stack([border, 1 - border], dim=1).log().float()
            tokens, certain = choice(logits, ROWS, 0)
            assert tokens.tolist() == [int(side < 0)] * 4
            assert certain.tolist() == [sure] * 4


def test_a_draw_is_unsure_where_level_tokens_stand_at_the_border_of_the_nucleus():
    mass = torch.tensor([[0.5, 0.2, 0.2 - 1e-6, 0.1]])
    swapped = mass[:, [0, 2, 1, 3]]
    for seed in range(20):
        settings = GenerationSettings(1, do_sample=True, top_p=0.6)
        choice = Choice(settings, [seed], torch.device("cpu"))
        results = [choice(each.log(), torch.tensor([0]), 0) for each in (mass, swapped)]
        (first, sure), (second, _) = results
        if sure:
            assert first.tolist() == second.tolist() == [0]
    apart = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    choices = [Choice(settings, [seed], torch.device("cpu"))(apart, torch.tensor([0]), 0)[1] for seed in range(20)]
    assert sum(map(bool, choices)) >= 19
