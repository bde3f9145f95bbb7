import torch

from bpo_fast.models.packing import Group, pack
from bpo_fast.ops.gather_rows import gather_rows


def test_gradient_is_that_of_indexing():
    packing = pack([Group([1, 2, 3], [[4], [5, 6], [7]]), Group([8], [[9, 10]])])
    x = torch.randn(len(packing.input_ids), 2, dtype=torch.float64, requires_grad=True)
    for index, rounds in ((packing.kv_index, packing.kv_rounds), (packing.logit_rows, packing.logit_rounds)):
        assert torch.equal(gather_rows(x, index, rounds), x[index])
        assert torch.autograd.gradcheck(lambda x, i=index, r=rounds: gather_rows(x, i, r), x)
