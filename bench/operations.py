"""The losses that `losses.py` measures: ours, plain PyTorch, peers and floors, over tensors that all of them share.

A step is one forward and, if there is one, backward pass. A process that runs one peer imports no other.
"""

import math
from functools import partial
from pkgutil import resolve_name
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import COMPILED, EAGER, FLOOR, IS_FLOOR, Candidate, Operation
from report import OURS

import bpo_fast
from bpo_fast.ops.head_sweep import chunk_rows, token_chunks
from bpo_fast.ops.rows import accumulation_dtype, num_processors

BETA, IGNORE_INDEX = 0.1, -100
TRAINED_HEAD, IN_PLACE = {"variant": "trained head"}, {"variant": "in place"}


class Problem(NamedTuple):
    """Hidden states or logits `rows`, the reference's, `head` [V, H], labels, and `targets`, what the rows predict."""

    rows: torch.Tensor
    ref_rows: torch.Tensor | None
    head: torch.Tensor | None
    labels: torch.Tensor
    targets: torch.Tensor

    def in_float64(self):
        rows, ref_rows, head = (None if tensor is None else tensor.detach().double() for tensor in self[:3])
        return Problem(rows.requires_grad_(self.rows.requires_grad), ref_rows, head, *self[3:])


def random_problem(options, sizes):
    """Random rows: hidden states where `sizes` have H, else logits; only the response, a sequence's end, counts."""
    sequences, vocab_size, width = sizes.get("sequences"), sizes["V"], sizes.get("H", sizes["V"])
    shape = (sequences, sizes["tokens"] // sequences) if sequences else (sizes.get("tokens") or sizes["rows"],)
    dtype, device = getattr(torch, options.dtype), options.device
    generator = torch.Generator(device).manual_seed(0)

    def random(*size, scale=1.0):
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

    rows = random(*shape, width)
    # A reference near the policy keeps the loss near ln 2, where neither it nor its gradient vanishes.
    ref_rows = rows + random(*shape, width, scale=0.1) if sequences else None
    head = random(vocab_size, width, scale=width**-0.5) if "H" in sizes else None
    labels = torch.randint(0, vocab_size, shape, generator=generator, device=device)
    labels[..., : shape[-1] - max(1, int(shape[-1] * options.response_fraction))] = IGNORE_INDEX
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if sequences else labels
    return Problem(rows.requires_grad_("rows" not in sizes), ref_rows, head, labels, targets)


def loss(make, row=None, peer=None, **traits):
    """The candidate of `make(problem, what "module:name" `peer` is) -> loss as a callable; with the rows' gradient."""

    def setup(p):
        if p.head is not None:
            p = p._replace(head=p.head.detach().requires_grad_(row is TRAINED_HEAD))
        if row is IN_PLACE:  # it writes its gradient over the logits, which after a step are gradients
            p = p._replace(rows=p.rows.detach().clone().requires_grad_())
        forward = make(p, resolve_name(peer)) if peer else make(p)
        inputs = [tensor for tensor in p[:3] if tensor is not None and tensor.requires_grad]

        def step():
            result = forward()
            return result.detach(), torch.autograd.grad(result, inputs)[0] if inputs else None

        return step

    return Candidate(setup, row or {}, peer and peer.split(".")[0].split(":")[0], **traits)


def objective(p, token_logps):
    """The loss of log-probs `token_logps(rows)`: minus their sum, or DPO's, chosen sequences first."""

    def forward():
        if p.ref_rows is None:
            return -token_logps(p.rows).sum()
        with torch.no_grad():  # one model's logits after the other's: the reference's are gone before the policy's are
            ref_logps = token_logps(p.ref_rows)
        chosen, rejected = (token_logps(p.rows).sum(-1) - ref_logps.sum(-1)).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    return forward


def ours_linear_dpo(p):
    return lambda: bpo_fast.linear_dpo_loss(p.rows, p.head, p.labels, ref_hidden=p.ref_rows, beta=BETA).loss


def ours_dpo(p, **options):
    return lambda: bpo_fast.dpo_loss(p.rows, p.labels, ref_logits=p.ref_rows, beta=BETA, **options).loss


def eager(p):
    """As it is written by hand: log-softmax of all logits, gather, sum."""

    def token_logps(rows):
        logits, targets = rows if p.head is None else rows @ p.head.t(), p.labels
        if targets.ndim == 2:
            logits, targets = logits[:, :-1], targets[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logps = F.log_softmax(logits, dim=-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        return logps.masked_fill(targets == IGNORE_INDEX, 0)

    return objective(p, token_logps)


def trl_fused_head(p, trl):
    """As TRL's `add_fused_lm_head` calls it: labelled rows only, its own chunk of the vocabulary."""
    chunk_size = resolve_name("trl.trainer.utils:_CHUNKED_LOGPROB_CHUNK_SIZE")

    def token_logps(hidden):
        mask = p.targets != IGNORE_INDEX
        logps = trl.apply(hidden[mask], p.head, None, p.targets[mask], 1.0, chunk_size, None, 1.0, ())[0]
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps)

    return objective(p, token_logps)


def liger_linear_dpo(p, liger):
    dpo, reference = liger(beta=BETA), {"ref_input": p.ref_rows, "ref_weight": p.head.detach()}
    return lambda: dpo(p.head, p.rows, p.targets, **reference)[0]


def liger_dpo(p, liger):
    ce = liger(reduction="none")
    return objective(p, lambda rows: -ce(rows.flatten(0, 1), p.targets.flatten()).view(p.targets.shape))


def linear_ce(p, function=F.linear_cross_entropy, **options):
    """A cross-entropy from hidden states: minus the sum of the log-probs."""
    return partial(function, p.rows, p.head, p.targets, reduction="sum", **options)


def products(p):
    """The matrix products alone, in the chunks that ours takes, into one memory: logits, their gradient times W."""
    hidden = p.rows.detach().flatten(0, -2)[: int((p.targets != IGNORE_INDEX).sum())]
    most = chunk_rows(len(p.head), accumulation_dtype(hidden.dtype), hidden.device)
    shape = hidden.shape[1], num_processors(hidden)
    chunks = [hidden[chunk] for chunk in token_chunks(len(hidden), most, *shape)]
    logits, gradient = hidden.new_empty(len(chunks[0]), len(p.head)), torch.empty_like(chunks[0])

    def step():
        for chunk in chunks:
            for _ in range(1 if p.ref_rows is None else 2):
                torch.mm(chunk, p.head.t(), out=logits[: len(chunk)])
            torch.mm(logits[: len(chunk)], p.head, out=gradient[: len(chunk)])

    return step


def copies(*tensors):
    """A step that reads and writes each of them once."""
    buffer = torch.empty_like(tensors[0])
    return lambda: [buffer.copy_(tensor) for tensor in tensors]


PLAIN = {EAGER: loss(eager), COMPILED: loss(lambda p: torch.compile(eager(p), dynamic=False), compiles=True)}
TRL_HEAD, TRL_LOGPS = "trl.kernels.chunked_logprob:ChunkedLogProbFunction", "trl.trainer.utils:selective_log_softmax"
LIGER, LIGER_DPO = "liger_kernel.transformers", "liger_kernel.chunked_loss:LigerFusedLinearDPOLoss"
CCE, CHUNKED = "cut_cross_entropy:linear_cross_entropy", torch.nn.LinearCrossEntropyOptions()
LINEAR_DPO = Operation(
    "linear_dpo_loss",
    "`linear_dpo_loss`: DPO from hidden states, live reference, forward and backward",
    lambda o: {"sequences": 2, "tokens": o.tokens, "H": o.hidden_size, "V": o.vocab_size},
    random_problem,
    {
        OURS: loss(ours_linear_dpo),
        **PLAIN,
        "TRL fused head": loss(trl_fused_head, peer=TRL_HEAD),
        f"{OURS}, trained head": loss(ours_linear_dpo, TRAINED_HEAD),
        "eager, trained head": loss(eager, TRAINED_HEAD),
        "Liger DPO, trained head": loss(liger_linear_dpo, TRAINED_HEAD, LIGER_DPO, compiles=True),
        FLOOR: Candidate(products, IS_FLOOR),
    },
)
LINEAR_LOGPS = Operation(
    "linear_token_logps",
    "`linear_token_logps`: sum of log-probs from hidden states, policy only, forward and backward",
    lambda o: {"tokens": o.policy_tokens, "H": o.hidden_size, "V": o.vocab_size},
    random_problem,
    {
        OURS: loss(lambda p: objective(p, lambda rows: bpo_fast.linear_token_logps(rows, p.head, p.targets))),
        **PLAIN,
        "TRL fused head": loss(trl_fused_head, peer=TRL_HEAD),
        "torch linear_cross_entropy": loss(linear_ce),
        "torch linear_cross_entropy, chunked": loss(partial(linear_ce, options=CHUNKED)),
        "cut-cross-entropy, torch_compile": loss(partial(linear_ce, impl="torch_compile"), peer=CCE, compiles=True),
        "cut-cross-entropy": loss(partial(linear_ce, impl="cce"), peer=CCE, cuda_only=True),
        "Liger fused linear CE": loss(
            lambda p, liger: partial(liger(reduction="sum"), p.head, p.rows, p.targets),
            peer=f"{LIGER}:LigerFusedLinearCrossEntropyLoss",
            cuda_only=True,
        ),
        FLOOR: Candidate(products, IS_FLOOR),
    },
)
DPO = Operation(
    "dpo_loss",
    "`dpo_loss`: DPO from logits, live reference, forward and backward",
    lambda o: {"sequences": o.logits_shape[0], "tokens": math.prod(o.logits_shape[:2]), "V": o.logits_shape[2]},
    random_problem,
    {
        OURS: loss(ours_dpo),
        f"{OURS}, in place": loss(partial(ours_dpo, inplace_backward=True), IN_PLACE),
        **PLAIN,
        "Liger CE, in place": loss(liger_dpo, IN_PLACE, f"{LIGER}:LigerCrossEntropyLoss", cuda_only=True),
        # What must be moved: the policy read twice, the reference read once, the gradient written once.
        FLOOR: Candidate(lambda p: copies(p.rows.detach(), p.ref_rows), IS_FLOOR),
    },
)
LOGPS = {
    OURS: loss(lambda p: objective(p, lambda rows: bpo_fast.token_logps(rows, p.targets))),
    **PLAIN,
    "F.cross_entropy": loss(
        lambda p: objective(p, lambda rows: -F.cross_entropy(rows.float(), p.targets, reduction="none"))
    ),
    "TRL selective_log_softmax": loss(lambda p, trl: objective(p, lambda rows: trl(rows, p.targets)), peer=TRL_LOGPS),
    # Half the logits read and written are what must be read.
    FLOOR: Candidate(lambda p: copies(p.rows.flatten()[: p.rows.numel() // 2]), IS_FLOOR),
}


def operations(options):
    """{name: operation}, in the order in which they are measured; the last with few rows, as scored while decoding."""
    found = {operation.name: operation for operation in (LINEAR_DPO, LINEAR_LOGPS, DPO)}
    for number in options.decode_rows:
        name, what = f"token_logps, {number} row{'s' * (number > 1)}", "`token_logps`: log-probs of few rows, forward"
        shape = partial(lambda number, o: {"rows": number, "V": o.vocab_size}, number)
        found[name] = Operation(name, what, shape, random_problem, LOGPS, calls=50, with_peak=False)
    return found
