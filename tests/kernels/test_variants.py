import pkgutil
from importlib import import_module
from inspect import signature

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import bpo_fast.kernels
from bpo_fast.kernels.heuristics import RowLaunch, row_launch
from bpo_fast.kernels.sequence_logps import launch_sequence_logps
from bpo_fast.kernels.sequence_logps_backward import launch_sequence_logps_backward
from bpo_fast.kernels.unit_exponentials import launch_unit_exponentials
from bpo_fast.kernels.unit_gradient import launch_unit_gradient
from bpo_fast.kernels.variants import recorded, variants


def test_every_kernel_has_a_variant():
    modules = [
        import_module(f"bpo_fast.kernels.{found.name}") for found in pkgutil.iter_modules(bpo_fast.kernels.__path__)
    ]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert len(kernels) > 3
    assert {variant.kernel.__name__ for variant in variants()} == kernels


def test_bytes_a_logit():
    """What the table says of a launch, by hand: the one-pass transform moves 6 bytes where two passes move 10."""
    found = {variant.name: variant.bytes_a_logit for variant in variants()}
    assert found["unit_exponentials[bfloat16] aligned"] == 4 + 2
    assert found["unit_gradient[bfloat16] aligned"] == found["unit_gradient[float16] aligned"] == 4 + 4 + 2
    assert found["unit_gradient[float32] aligned"] == 4 + 4 + 4
    assert found["unit_gradient[float32,log-probs only] aligned"] == 4
    assert found["sequence_logps[bfloat16,sums] aligned"] == 2
    assert found["sequence_logps_backward[bfloat16,sums] aligned"] == 2 + 2
    assert found["sigmoid_preference[reference]"] == 0


def test_names_are_unlike():
    names = [variant.name for variant in variants()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("variant", variants(), ids=lambda variant: variant.name)
def test_the_source_is_what_a_launch_compiles(variant):
    """Signature, constants and attributes as Triton's own launch makes them of the same arguments."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    kernel = variant.kernel
    bind = create_function_from_signature(signature(kernel.fn), kernel.params, backend)
    arguments, specialization, given = bind(**variant.arguments, **variant.options, debug=False)
    _, types, constants, attributes = kernel._pack_args(backend, given, arguments, specialization, given)
    source = variant.source()
    assert source.signature == types
    assert source.constants == constants
    assert source.attrs == {place: found for place, found in attributes.items() if found}


def launched(launch):
    """What the kernels over rows get of `launch`, on logits of a shape that the rule splits."""
    with torch.device("meta"):
        logits, floats = torch.empty(1, 2, 128256), torch.empty(4, 1, 2)
        targets = torch.empty(1, 2, dtype=torch.int64)
    options = {"softcap": None, "temperature": 1.0, "launch": launch}
    outputs = dict.fromkeys(("policy_sums", "reference_sums", "num_targets", "statistics"))
    outputs |= {"token_logps": floats[:1], "row_numbers": floats[:2], "num_processors": 132}
    grads = {"grad_token_logps": floats[0], "grad_sums": None}
    tensors = (logits[0], logits[0], targets[0], None, None, floats[0, 0], None, None, 1.0)
    halves = (logits[0], logits[0].bfloat16(), targets[0], None, *floats[:3, 0], None, None, 1.0)
    return (
        recorded("", launch_sequence_logps, logits, None, targets, **outputs, **options),
        recorded("", launch_sequence_logps_backward, logits, targets, floats, logits, **grads, **options),
        recorded("", launch_unit_gradient, *tensors, launch=launch),
        recorded("", launch_unit_exponentials, *halves, launch=launch),
    )


def test_a_launch_that_is_given_is_taken_and_else_the_rule():
    rule = row_launch(2, 128256, 4, 132)
    other = RowLaunch(columns=512, vector=2, interleaved=True, unroll=3, num_warps=2, splits=2)
    for launch, expected in ((None, rule), (other, other)):
        for variant in launched(launch):
            found = {name: variant.arguments[name] for name in ("COLUMNS", "VECTOR", "INTERLEAVED", "UNROLL")}
            assert tuple(found.values()) == expected[:4]
            assert variant.num_warps == expected.num_warps
            assert variant.arguments.get("SPLITS", expected.splits) == expected.splits


@triton.jit
def _kernel(x, number, one, absent, factor, SIZE: tl.constexpr):
    pass


def test_a_launch_is_recorded_and_not_run():
    x = torch.empty(3, dtype=torch.float16, device="meta")

    def launch(x, factor):
        _kernel[(1,)](x, 2**40, 1, None, factor, SIZE=1, num_warps=2)

    variant = recorded("name", launch, x, factor=1.0)
    assert isinstance(variant.kernel, JITFunction)
    assert (variant.kernel, variant.options, variant.num_warps) == (_kernel, {"num_warps": 2}, 2)
    source = variant.source()
    kinds = ("*fp16", "i64", "constexpr", "constexpr", "fp32", "constexpr")
    assert source.signature == dict(zip(_kernel.arg_names, kinds, strict=True))
    assert source.constants == {(2,): 1, (3,): None, (5,): 1}
    assert set(source.attrs) == {(0,), (1,)}
