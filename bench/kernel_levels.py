"""The jobs that `kernels.py` measures, and for each the candidates that do it: ours, peers, floors."""

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

from kernel_peers import (
    BETA,
    compiled,
    copy_floor,
    cut_cross_entropy,
    eager_dpo,
    eager_linear_dpo,
    eager_linear_logps,
    eager_logps,
    half_copy_floor,
    in_place,
    lazy,
    liger_ce_dpo,
    liger_dpo,
    liger_linear_ce,
    plain,
    products_floor,
    random_problem,
    torch_cross_entropy,
    torch_linear_ce,
    trl_dpo,
    trl_logps,
    trl_selective,
)

import bpo_fast

# How far a candidate's loss (relative, or absolute below 1) and gradient (relative, Euclidean norm) may be from plain
# PyTorch's in float64. A loss compares sums of a thousand log-probs, about -12,000, of which float32 keeps 1e-3. In 16
# bits, logits of about 4 are rounded by 1e-2.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
OURS, EAGER, COMPILED, FLOOR = "bpo_fast", "eager", "torch.compile", "floor"


class Candidate(NamedTuple):
    """One way to do a job: `make(problem)` returns its step.

    `compiles`: its first step compiles; `trains_head`: it also makes the head's gradient.
    """

    name: str
    make: object
    package: str | None = None
    cuda_only: bool = False
    compiles: bool = False
    trains_head: bool = False
    is_floor: bool = False

    def missing(self, device):
        """Why this candidate cannot run here, in a few words; None if it can."""
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.cuda_only and device != "cuda":
            return "CUDA only"
        if self.compiles and device == "cpu" and shutil.which("c++") is None and shutil.which("g++") is None:
            return "no C++ compiler for torch.compile"
        return None


@dataclass(frozen=True)
class Level:
    """A job: `shape(options)` its sizes, `problem(options)` its tensors.

    `calls`: how often a timed step does it, `with_peak`: whether its memory is worth a look.
    """

    name: str
    what: str
    shape: object
    problem: object
    candidates: tuple
    calls: int = 1
    with_peak: bool = True

    def candidate(self, name):
        return next(candidate for candidate in self.candidates if candidate.name == name)


def ours_linear_dpo(problem, weight):
    return bpo_fast.linear_dpo_loss(problem.rows, weight, problem.labels, ref_hidden=problem.ref_rows, beta=BETA).loss


def ours_linear_logps(problem, weight):
    return -bpo_fast.linear_token_logps(problem.rows, weight, problem.labels).sum()


def ours_dpo(**options):
    def loss(problem, weight):
        return bpo_fast.dpo_loss(problem.rows, problem.labels, ref_logits=problem.ref_rows, beta=BETA, **options).loss

    return loss


def ours_logps(problem, weight):
    return bpo_fast.token_logps(problem.rows, problem.labels).sum()


LINEAR_DPO = Level(
    "linear_dpo_loss",
    "DPO from hidden states, live reference, forward and backward",
    lambda options: {"sequences": 2, "tokens": options.tokens, "H": options.hidden_size, "V": options.vocab_size},
    lambda options: random_problem(options, (2, options.tokens // 2), options.vocab_size),
    (
        Candidate(OURS, plain(ours_linear_dpo)),
        Candidate(EAGER, plain(eager_linear_dpo)),
        Candidate(COMPILED, lazy(compiled(eager_linear_dpo)), compiles=True),
        Candidate("TRL fused head", lazy(trl_dpo), package="trl"),
        Candidate("bpo_fast, trained head", plain(ours_linear_dpo, trains_head=True), trains_head=True),
        Candidate("eager, trained head", plain(eager_linear_dpo, trains_head=True), trains_head=True),
        Candidate(
            "Liger DPO, trained head",
            lazy(liger_dpo, trains_head=True),
            package="liger_kernel",
            compiles=True,
            trains_head=True,
        ),
        Candidate(FLOOR, products_floor(with_reference=True), is_floor=True),
    ),
)

LINEAR_LOGPS = Level(
    "linear_token_logps",
    "sum of log-probs from hidden states, policy only, forward and backward",
    lambda options: {"tokens": options.policy_tokens, "H": options.hidden_size, "V": options.vocab_size},
    lambda options: random_problem(options, (options.policy_tokens,), options.vocab_size, reference=False),
    (
        Candidate(OURS, plain(ours_linear_logps)),
        Candidate(EAGER, plain(eager_linear_logps)),
        Candidate(COMPILED, lazy(compiled(eager_linear_logps)), compiles=True),
        Candidate("TRL fused head", lazy(trl_logps), package="trl"),
        Candidate("torch linear_cross_entropy", plain(torch_linear_ce(chunked=False))),
        Candidate("torch linear_cross_entropy, chunked", plain(torch_linear_ce(chunked=True))),
        Candidate(
            "cut-cross-entropy, torch_compile",
            lazy(cut_cross_entropy("torch_compile")),
            package="cut_cross_entropy",
            compiles=True,
        ),
        Candidate("cut-cross-entropy", lazy(cut_cross_entropy("cce")), package="cut_cross_entropy", cuda_only=True),
        Candidate("Liger fused linear CE", lazy(liger_linear_ce), package="liger_kernel", cuda_only=True),
        Candidate(FLOOR, products_floor(with_reference=False), is_floor=True),
    ),
)

DPO = Level(
    "dpo_loss",
    "DPO from logits, live reference, forward and backward",
    lambda options: dict(zip(("sequences", "tokens", "V"), options.logits_shape, strict=True)),
    lambda options: random_problem(options, options.logits_shape[:2], options.logits_shape[2], head=False),
    (
        Candidate(OURS, plain(ours_dpo())),
        Candidate("bpo_fast, in place", in_place(lambda problem: ours_dpo(inplace_backward=True))),
        Candidate(EAGER, plain(eager_dpo)),
        Candidate(COMPILED, lazy(compiled(eager_dpo)), compiles=True),
        Candidate("Liger CE, in place", in_place(liger_ce_dpo), package="liger_kernel", cuda_only=True),
        Candidate(FLOOR, copy_floor, is_floor=True),
    ),
)


def decode_level(num_rows):
    """Few rows over a large vocabulary, as in scoring while decoding: forward only."""
    return Level(
        f"token_logps, {num_rows} row{'s' if num_rows > 1 else ''}",
        "log-probs of few rows from logits, forward",
        lambda options: {"rows": num_rows, "V": options.vocab_size},
        lambda options: random_problem(
            options, (num_rows,), options.vocab_size, head=False, reference=False, differentiable=False
        ),
        (
            Candidate(OURS, plain(ours_logps)),
            Candidate(EAGER, plain(eager_logps)),
            Candidate(COMPILED, lazy(compiled(eager_logps)), compiles=True),
            Candidate("F.cross_entropy", plain(torch_cross_entropy)),
            Candidate("TRL selective_log_softmax", lazy(trl_selective), package="trl"),
            Candidate(FLOOR, half_copy_floor, is_floor=True),
        ),
        calls=50,
        with_peak=False,
    )
