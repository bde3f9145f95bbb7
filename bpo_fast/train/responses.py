"""The responses of a packed sequence's pairs, in the order that losses have them."""

import torch

from bpo_fast.losses.preference import Responses
from bpo_fast.models.packed_forward import sum_branches
from bpo_fast.models.packing import Packing


def packed_responses(packing: Packing, num_pairs: int) -> Responses:
    """How the tokens of a packed sequence belong to the responses of its pairs.

    Args:
        packing: of the pairs' groups, chosen and rejected each, and behind them all of their second roots, if they
            have any: the chosen response after the weakened image.
        num_pairs: B.
    """
    both = 2 * num_pairs

    def in_order(branches: torch.Tensor) -> torch.Tensor:
        """chosen, rejected, chosen, ... and the second roots' -> all chosen, all rejected, all second roots'."""
        chosen_first = branches[:both].view(-1, 2).t().reshape(-1)
        return chosen_first if len(branches) == both else torch.cat([chosen_first, branches[both:]])

    def places() -> tuple[torch.Tensor, torch.Tensor]:
        branch = packing.branch_index
        return packing.branch_offset, torch.where(branch < both, branch // 2, branch - both)

    return Responses(
        sums=lambda values: in_order(sum_branches(values, packing)),
        places=places,
        num_tokens=in_order(packing.num_tokens),
    )
