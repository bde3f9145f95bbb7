"""The forms of each kernel that the ops launch, as `aot.py` compiles them without a GPU.

A form is not described but launched: its launcher gets tensors of the device "meta", which have a shape and no memory,
and what it hands to the kernel is recorded instead of run. So what a kernel is given stands in its own file alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from bpo_fast.kernels.sequence_logps import launch_sequence_logps
from bpo_fast.kernels.sequence_logps_backward import launch_sequence_logps_backward
from bpo_fast.kernels.sigmoid_preference import launch_sigmoid_preference
from bpo_fast.kernels.unit_exponentials import launch_unit_exponentials
from bpo_fast.kernels.unit_gradient import launch_unit_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Odd numbers of rows: a launch tells the compiler which numbers are multiples of 16, and of these it must not count on
# that. Few rows are split over programs on a GPU of that many multiprocessors.
NUM_SEQUENCES, MANY_TOKENS, FEW_TOKENS, NUM_PROCESSORS = 3, 2731, 3, 132
# The arguments that a kernel over rows moves a logit of, once each.
MOVED = {
    "sequence_logps_kernel": ("policy",),
    "sequence_logps_backward_kernel": ("logits", "grad_logits"),
    "unit_gradient_kernel": ("logits", "logits", "gradient"),
    "unit_exponentials_kernel": ("logits", "exponentials"),
}
PLAIN, TRANSFORM = {"softcap": None, "temperature": 1.0}, {"softcap": 30.0, "temperature": 0.7}


@dataclass(frozen=True)
class Variant:
    """One kernel, the arguments of one launch of it by name, and the options of its compiler."""

    name: str
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def num_warps(self) -> int:
        return self.options["num_warps"]

    @property
    def loads_a_logit(self) -> int:
        """Bytes that one turn of a loop over a row loads for each logit, a bias among them; 0 without such a loop."""
        moved = [self.arguments[name] for name in MOVED.get(self.kernel.__name__, ())[:1]]
        return sum(tensor.element_size() for tensor in (*moved, self.arguments.get("bias")) if tensor is not None)

    @property
    def bytes_a_logit(self) -> int:
        """Bytes that are read and written for each logit of a row; what is read twice counts twice."""
        moved = [self.arguments[name] for name in MOVED.get(self.kernel.__name__, ())]
        # Without a gradient nothing is written, and there is no second pass to read for it.
        moved = moved if all(tensor is not None for tensor in moved) else moved[:1]
        return sum(tensor.element_size() for tensor in moved)

    def source(self) -> ASTSource:
        """What Triton compiles for these arguments: constants are constexprs, None and 1; multiples of 16 are said."""
        signature, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            kind = "constexpr" if parameter.is_constexpr else mangle_type(value, specialize=True)
            signature[parameter.name] = kind
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if kind == "constexpr":
                constants[parameter.name] = value
            elif isinstance(number, int) and number % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


def recorded(name: str, launcher: Callable, *tensors: Any, **options: Any) -> Variant:
    """The one launch that `launcher` makes of these tensors and options."""
    launches = []

    def record(kernel, *arguments, grid, warmup, **keywords):
        launches.append((kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | keywords))

    with patch.object(JITFunction, "run", record):
        launcher(*tensors, **options)
    ((kernel, given),) = launches
    arguments = {name: given.pop(name) for name in kernel.arg_names}
    return Variant(name, kernel, arguments, options=given)


def _name(kernel, dtype, label, vocab_size):
    aligned = " aligned" if vocab_size % 16 == 0 else ""
    return f"{kernel}[{str(dtype).removeprefix('torch.')}{label}]{aligned}"


def _forward(label, dtype, vocab_size, num_tokens, *, sums=False, statistics=False, gradient=True, transform=PLAIN):
    num_sequences = NUM_SEQUENCES if num_tokens > 1 else 1
    policy, reference = (torch.empty(num_sequences, num_tokens, vocab_size, dtype=dtype) for _ in range(2))
    targets = torch.empty(num_sequences, num_tokens, dtype=torch.int64)
    # Of what is written only the type counts, and how many planes there are.
    floats = torch.empty(2, num_sequences, num_tokens)
    results = dict.fromkeys(("policy_sums", "reference_sums"), floats if sums else None)
    results |= {"num_targets": targets if sums else None, "statistics": floats if statistics else None}
    results |= {"token_logps": floats, "row_numbers": floats if gradient else None}
    name, options = _name("sequence_logps", dtype, label, vocab_size), transform | {"num_processors": NUM_PROCESSORS}
    return recorded(name, launch_sequence_logps, policy, reference, targets, **results, **options)


def _backward(label, dtype, vocab_size, *, tokens=False, sums=False, transform=PLAIN):
    logits, grad_logits = (torch.empty(NUM_SEQUENCES, MANY_TOKENS, vocab_size, dtype=dtype) for _ in range(2))
    floats = torch.empty(2, NUM_SEQUENCES, MANY_TOKENS)
    targets = torch.empty_like(floats[0], dtype=torch.int64)
    grads = {"grad_token_logps": floats if tokens else None, "grad_sums": floats if sums else None}
    name, tensors = _name("sequence_logps_backward", dtype, label, vocab_size), (logits, targets, floats, grad_logits)
    return recorded(name, launch_sequence_logps_backward, *tensors, **grads, **transform)


def _unit_gradient(label, dtype, vocab_size, *, targets=True, gradient=True, statistics=False, everything=False):
    logits, floats = torch.empty(MANY_TOKENS, vocab_size), torch.empty(4, MANY_TOKENS)
    tensors = (
        logits.view(dtype)[:, :vocab_size] if gradient else None,
        torch.empty(MANY_TOKENS, dtype=torch.int64) if targets else None,
        *((torch.empty(vocab_size, dtype=dtype), floats) if everything else (None, None)),
        floats,
        floats if statistics else None,
    )
    name, transform = _name("unit_gradient", dtype, label, vocab_size), TRANSFORM if everything else PLAIN
    return recorded(name, launch_unit_gradient, logits, *tensors, **transform)


def _unit_exponentials(label, vocab_size, *, targets=True, statistics=False, everything=False):
    logits, floats = torch.empty(MANY_TOKENS, vocab_size), torch.empty(4, MANY_TOKENS)
    tensors = (
        torch.empty(MANY_TOKENS, -(-vocab_size // 8) * 8, dtype=torch.bfloat16)[:, :vocab_size],
        torch.empty(MANY_TOKENS, dtype=torch.int64) if targets else None,
        torch.empty(vocab_size, dtype=torch.bfloat16) if everything else None,
        *(floats, floats, floats if targets else None),
        floats if statistics else None,
    )
    name = _name("unit_exponentials", torch.bfloat16, label, vocab_size)
    return recorded(name, launch_unit_exponentials, logits, *tensors, **(TRANSFORM if everything else PLAIN))


def _sigmoid_preference(label, *, average):
    floats = torch.empty(2 * MANY_TOKENS)
    num_tokens = torch.empty(2 * MANY_TOKENS, dtype=torch.int64) if average else None
    tensors = (floats, floats, num_tokens, floats, floats, floats)
    name = f"sigmoid_preference[{label}]"
    return recorded(name, launch_sigmoid_preference, *tensors, beta=0.1, label_smoothing=0.0)


def _row_variants(wide: int, narrow: int) -> Iterator[Variant]:
    """The kernels over rows of `wide` logits, and of `narrow`, whose tile is one that fewer warps read."""
    for dtype in DTYPES:
        yield _forward("", dtype, wide, MANY_TOKENS)
        yield _forward(",sums", dtype, wide, MANY_TOKENS, sums=True)
        yield _forward(",sums,statistics", dtype, wide, MANY_TOKENS, sums=True, statistics=True)
        yield _forward(",split", dtype, wide, FEW_TOKENS)
        yield _forward(",split,no gradient", dtype, wide, FEW_TOKENS, gradient=False)
        yield _forward(",everything", dtype, wide, FEW_TOKENS, sums=True, statistics=True, transform=TRANSFORM)
        yield _backward(",sums", dtype, wide, sums=True)
        yield _backward(",tokens", dtype, wide, tokens=True)
        yield _backward(",everything", dtype, wide, tokens=True, sums=True, transform=TRANSFORM)
        yield _unit_gradient("", dtype, wide)
        yield _unit_gradient(",statistics", dtype, wide, statistics=True)
        yield _unit_gradient(",everything", dtype, wide, everything=True)
    yield _unit_exponentials("", wide)
    yield _unit_exponentials(",statistics", wide, statistics=True)
    yield _unit_exponentials(",everything", wide, statistics=True, everything=True)
    yield _unit_exponentials(",log-sum-exp", wide, targets=False)
    yield _forward(",sums,narrow", torch.bfloat16, narrow, MANY_TOKENS, sums=True)
    yield _backward(",sums,narrow", torch.bfloat16, narrow, sums=True)
    yield _unit_gradient(",log-probs only", torch.float32, wide, gradient=False)
    yield _unit_gradient(",log-sum-exp", torch.float16, wide, targets=False)


@cache
def variants() -> tuple[Variant, ...]:
    """Every kernel in every form that the ops launch."""
    with torch.device("meta"):
        return (
            *_row_variants(wide=128255, narrow=207),
            *_row_variants(wide=128256, narrow=208),
            # One row of one logit: Triton turns each number that is 1 into a constant.
            _forward(",sums,ones", torch.float32, 1, num_tokens=1, sums=True),
            _sigmoid_preference("reference", average=False),
            _sigmoid_preference("everything", average=True),
        )
