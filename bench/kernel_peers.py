"""What `kernels.py` runs beside our own losses: plain PyTorch, peers, floors; and the tensors that all of them share.

A loss is a function of (problem, weight). Peers are imported where their loss is made, by a function of the problem,
so that a process that runs one of them holds no other. A step is one forward and, where the job has one, backward
pass: it returns (loss, gradient of the hidden states or logits); a floor's step returns nothing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bpo_fast.ops.head_sweep import chunk_rows, token_chunks
from bpo_fast.ops.rows import accumulation_dtype

BETA = 0.1
IGNORE_INDEX = -100


@dataclass
class Problem:
    """Tensors of one job. `rows` are hidden states or logits, `ref_rows` the reference's; `head` [V, H] or None."""

    rows: torch.Tensor
    ref_rows: torch.Tensor | None
    head: torch.Tensor | None
    labels: torch.Tensor

    def in_float64(self):
        """The same values in float64, for what a result is compared with."""
        tensors = [
            None if tensor is None else tensor.detach().double() for tensor in (self.rows, self.ref_rows, self.head)
        ]
        return Problem(tensors[0].requires_grad_(self.rows.requires_grad), *tensors[1:], self.labels)


def random_problem(options, shape, vocab_size, *, head=True, reference=True, differentiable=True):
    """Random rows [*shape, H or V]; of each sequence only the last part, the response, is labelled."""
    dtype, device = getattr(torch, options.dtype), options.device
    generator = torch.Generator(device).manual_seed(0)

    def random(*size, scale=1.0):
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

    width = options.hidden_size if head else vocab_size
    rows = random(*shape, width)
    # A reference near the policy keeps the loss near ln 2, where neither it nor its gradient vanishes.
    ref_rows = rows + random(*shape, width, scale=0.1) if reference else None
    weight = random(vocab_size, width, scale=width**-0.5) if head else None
    labels = torch.randint(0, vocab_size, shape, generator=generator, device=device)
    labels[..., : shape[-1] - max(1, int(shape[-1] * options.response_fraction))] = IGNORE_INDEX
    return Problem(rows.requires_grad_(differentiable), ref_rows, weight, labels)


def _shift(labels):
    """Targets of every position: the next label, and none for the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _step(loss_of, problem, weight):
    """The step of `loss_of(problem, weight)`: gradients of the rows, and of the head where it requires one."""
    inputs = [tensor for tensor in (problem.rows, weight) if tensor is not None and tensor.requires_grad]

    def step():
        loss = loss_of(problem, weight)
        return loss.detach(), torch.autograd.grad(loss, inputs)[0] if inputs else None

    return step


def plain(function, trains_head=False):
    """`make` of a candidate that is a function of (problem, weight)."""

    def make(problem):
        weight = None if problem.head is None else problem.head.detach().requires_grad_(trains_head)
        return _step(function, problem, weight)

    return make


def lazy(load, trains_head=False):
    """As `plain`, of a function that `load(problem)` makes, so that a peer is imported only where it is run."""
    return lambda problem: plain(load(problem), trains_head)(problem)


# Log-probs and DPO as they are written by hand: log-softmax of all logits, gather, sum.


def eager_token_logps(logits, targets):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = F.log_softmax(logits, dim=-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return logps.masked_fill(targets == IGNORE_INDEX, 0)


def dpo_of_logps(logps, ref_logps):
    """DPO's loss from log-probs of tokens [2B, T], chosen rows first."""
    chosen, rejected = (logps.sum(-1) - ref_logps.sum(-1)).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def eager_dpo(problem, weight):
    targets = problem.labels[:, 1:]
    with torch.no_grad():
        ref_logps = eager_token_logps(problem.ref_rows[:, :-1], targets)
    return dpo_of_logps(eager_token_logps(problem.rows[:, :-1], targets), ref_logps)


def eager_linear_dpo(problem, weight):
    targets = problem.labels[:, 1:]
    # One model's logits after the other's: those of the reference are gone before the policy's are made.
    with torch.no_grad():
        ref_logps = eager_token_logps((problem.ref_rows @ weight.t())[:, :-1], targets)
    return dpo_of_logps(eager_token_logps((problem.rows @ weight.t())[:, :-1], targets), ref_logps)


def eager_linear_logps(problem, weight):
    return -eager_token_logps(problem.rows @ weight.t(), problem.labels).sum()


def eager_logps(problem, weight):
    return eager_token_logps(problem.rows, problem.labels).sum()


def torch_cross_entropy(problem, weight):
    return -F.cross_entropy(problem.rows.float(), problem.labels, reduction="sum")


# Peers.


def compiled(loss):
    """`loss` compiled for one shape."""
    return lambda problem: torch.compile(loss, dynamic=False)


def liger_dpo(problem):
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA)
    return lambda problem, weight: loss(
        weight, problem.rows, _shift(problem.labels), ref_input=problem.ref_rows, ref_weight=weight.detach()
    )[0]


def _trl_token_logps():
    """TRL's fused head as its `add_fused_lm_head` calls it: labelled rows only, its own chunk of the vocabulary."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def token_logps(hidden, weight, targets):
        mask = targets != IGNORE_INDEX
        logps = ChunkedLogProbFunction.apply(
            hidden[mask], weight, None, targets[mask], 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )[0]
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps)

    return token_logps


def trl_dpo(problem):
    token_logps = _trl_token_logps()

    def loss(problem, weight):
        targets = _shift(problem.labels)
        with torch.no_grad():
            ref_logps = token_logps(problem.ref_rows, weight, targets)
        return dpo_of_logps(token_logps(problem.rows, weight, targets), ref_logps)

    return loss


def trl_logps(problem):
    token_logps = _trl_token_logps()
    return lambda problem, weight: -token_logps(problem.rows, weight, problem.labels).sum()


def liger_linear_ce(problem):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda problem, weight: loss(weight, problem.rows, problem.labels)


def cut_cross_entropy(implementation):
    def load(problem):
        from cut_cross_entropy import linear_cross_entropy

        return lambda problem, weight: linear_cross_entropy(
            problem.rows, weight, problem.labels, reduction="sum", impl=implementation
        )

    return load


def torch_linear_ce(chunked):
    def loss(problem, weight):
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return F.linear_cross_entropy(problem.rows, weight, problem.labels, reduction="sum", options=options)

    return loss


def liger_ce_dpo(problem):
    from liger_kernel.transformers import LigerCrossEntropyLoss

    cross_entropy = LigerCrossEntropyLoss(reduction="none")

    def token_logps(logits, targets):
        return -cross_entropy(logits.flatten(0, 1), targets.flatten()).view(targets.shape)

    def loss(problem, weight):
        targets = _shift(problem.labels)
        with torch.no_grad():
            ref_logps = token_logps(problem.ref_rows, targets)
        return dpo_of_logps(token_logps(problem.rows, targets), ref_logps)

    return loss


def in_place(load):
    """`make` of one that writes its gradient over the logits: it gets its own, which after a step are gradients."""

    def make(problem):
        own = Problem(problem.rows.detach().clone().requires_grad_(), problem.ref_rows, None, problem.labels)
        return _step(load(own), own, None)

    return make


def trl_selective(problem):
    from trl.trainer.utils import selective_log_softmax

    return lambda problem, weight: selective_log_softmax(problem.rows, problem.labels).sum()


# Floors.


def products_floor(with_reference):
    """The matrix products alone, in the chunks that ours takes, into one memory: logits, their gradient times W."""

    def make(problem):
        hidden, head = problem.rows.detach().flatten(0, -2), problem.head
        targets = _shift(problem.labels) if problem.labels.ndim == 2 else problem.labels
        hidden = hidden[: int((targets != IGNORE_INDEX).sum())]
        most = chunk_rows(len(head), accumulation_dtype(hidden.dtype), hidden.device)
        chunks = [hidden[chunk] for chunk in token_chunks(len(hidden), most)]
        logits = hidden.new_empty(len(chunks[0]), len(head))
        gradient = torch.empty_like(chunks[0])

        def step():
            for chunk in chunks:
                if with_reference:
                    torch.mm(chunk, head.t(), out=logits[: len(chunk)])
                torch.mm(chunk, head.t(), out=logits[: len(chunk)])
                torch.mm(logits[: len(chunk)], head, out=gradient[: len(chunk)])

        return step

    return make


def copy_floor(problem):
    """Two copies move what the job must: policy read twice, reference read once, gradient written once."""
    logits, buffer = problem.rows.detach(), torch.empty_like(problem.ref_rows)

    def step():
        buffer.copy_(logits)
        buffer.copy_(problem.ref_rows)

    return step


def half_copy_floor(problem):
    """A copy of half the logits reads and writes together what the job must read."""
    half = problem.rows.flatten()[: problem.rows.numel() // 2]
    buffer = torch.empty_like(half)
    return lambda: buffer.copy_(half)
