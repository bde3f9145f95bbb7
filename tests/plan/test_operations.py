"""What the head costs on a card, by hand."""

import pytest
import torch

from bpo_fast.ops.head_sweep import Arguments
from bpo_fast.plan.operations import costs, on_card

NUM_TOKENS, WIDTH, VOCABULARY = 200, 8, 1000
LOGITS = NUM_TOKENS * VOCABULARY


@pytest.mark.parametrize(
    ("dtype", "with_rows", "bytes_a_logit", "inside_a_logit"),
    [
        (torch.bfloat16, False, 4, 4),  # read once
        (torch.bfloat16, True, 4 + 2, 4 + 2),  # and written elsewhere as bfloat16 as it is read
        (torch.float16, True, 4 + 4 + 2, 4),  # read twice, written over itself
    ],
)
def test_the_transform_of_logits(dtype, with_rows, bytes_a_logit, inside_a_logit):
    hidden, weight = torch.empty(NUM_TOKENS, WIDTH, dtype=dtype), torch.empty(VOCABULARY, WIDTH, dtype=dtype)
    arguments = Arguments(hidden=hidden, weight=weight, with_rows=with_rows)
    cost = costs(on_card(48 << 30))[torch.ops.bpo_fast.linear_token_logps](*arguments)
    assert cost.flops == (2 + 2 * with_rows) * LOGITS * WIDTH
    assert cost.other_bytes == bytes_a_logit * LOGITS
    rows = 4 * NUM_TOKENS * WIDTH * with_rows  # the unit-gradient rows of the chunk
    assert cost.inside == inside_a_logit * LOGITS + rows
