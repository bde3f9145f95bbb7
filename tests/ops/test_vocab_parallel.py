"""Two processes over gloo, each with a part of the head, against one process with all of it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bpo_fast import linear_token_logps
from bpo_fast.ops.vocab_parallel import vocab_parallel_token_logps

# The first process holds the larger part; the last rows of neither are a whole tile.
VOCAB_SIZE, FIRST = 301, 190


def _problem(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((2, 7, 16), (VOCAB_SIZE, 16), (VOCAB_SIZE,))
    )
    targets = torch.randint(0, VOCAB_SIZE, (2, 7), generator=generator)
    targets[0, 0], targets[1, 1], targets[0, 3], targets[1, 6] = 0, VOCAB_SIZE - 1, FIRST, -100
    upstream = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    return hidden, weight, bias, targets, upstream


def _run(rank, store, dtype, with_bias, softcap, temperature, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    hidden, weight, bias, targets, upstream = _problem(dtype)
    rows = slice(0, FIRST) if rank == 0 else slice(FIRST, None)
    leaves = [hidden.requires_grad_(), weight[rows].clone().requires_grad_()]
    leaves += [bias[rows].clone().requires_grad_()] if with_bias else []
    logps = vocab_parallel_token_logps(
        *leaves[:2],
        targets,
        vocab_start=rows.start,
        bias_shard=leaves[2] if with_bias else None,
        logit_softcap=softcap,
        temperature=temperature,
    )
    grads = torch.autograd.grad((logps * upstream.to(logps.dtype)).sum(), leaves)
    # A token that neither process holds, beside one that the second does.
    outside = torch.tensor([VOCAB_SIZE, VOCAB_SIZE - 1])
    leaf = hidden.detach()[0, :2].clone().requires_grad_()
    lost = vocab_parallel_token_logps(leaf, leaves[1].detach(), outside, vocab_start=rows.start)
    (lost_grad,) = torch.autograd.grad(lost.sum(), leaf)
    results[rank] = [*(x.detach().clone() for x in (logps, *grads)), lost_grad[:, 0] + lost_grad[:, -1], lost.detach()]
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("dtype", "with_bias", "softcap", "temperature"),
    [(torch.float64, True, 5.0, 0.7), (torch.float32, False, None, 1.0), (torch.bfloat16, True, None, 1.0)],
)
def test_two_shards_are_the_whole_head(dtype, with_bias, softcap, temperature, tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_run, (tmp_path / "store", dtype, with_bias, softcap, temperature, results), nprocs=2)
        first, second = results[0], results[1]
    hidden, weight, bias, targets, upstream = _problem(dtype)
    leaves = [x.requires_grad_() for x in ([hidden, weight, bias] if with_bias else [hidden, weight])]
    logps = linear_token_logps(
        *leaves[:2], targets, bias=leaves[2] if with_bias else None, logit_softcap=softcap, temperature=temperature
    )
    grads = torch.autograd.grad((logps * upstream.to(logps.dtype)).sum(), leaves)
    # Another order of adding up; in bfloat16 also one rounding more, of each process's gradient before they are added.
    exact = 1e-10 if dtype == torch.float64 else 1e-5
    rounded = 2**-6 if dtype == torch.bfloat16 else exact
    for lost in (*first[-2:], *second[-2:]):
        assert lost.isnan().tolist() == [True, False]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(first[0], logps.detach(), rtol=exact, atol=exact)
    torch.testing.assert_close(first[1], grads[0], rtol=rounded, atol=rounded)
    for position, grad in enumerate(grads[1:], start=2):
        torch.testing.assert_close(torch.cat([first[position], second[position]]), grad, rtol=rounded, atol=rounded)
