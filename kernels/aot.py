"""Compile every kernel for every supported architecture, without a GPU: `python -m bpo_fast.kernels.aot`.

Prints one line a kernel, variant and architecture: registers a thread, bytes spilled to local memory, bytes of shared
memory. Ends with code 1 if anything spills, or needs more shared memory than the smallest of these architectures gives
a block.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bpo_fast.kernels import sequence_logps, unit_gradient

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# 99 KiB: what a block may use on sm_86, 89 and 120; the others allow more.
SHARED_LIMIT = 99 * 1024

_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Variant:
    """One kernel with the types of its pointers and the values of its constants. Integers not named are int32.

    `aligned` tells the compiler, as the launcher does for such numbers, that the vocabulary and all strides are
    multiples of 16; it then reads 16 bytes at a time. Other vocabularies run the other form.
    """

    name: str
    kernel: object
    pointers: dict
    constants: dict = field(default_factory=dict)
    floats: tuple = ()
    aligned: bool = False

    def source(self):
        signature, attributes = {}, {}
        for position, argument in enumerate(self.kernel.arg_names):
            if argument in self.constants:
                signature[argument] = "constexpr"
            elif argument in self.pointers:
                signature[argument] = f"*{self.pointers[argument]}"
                # PyTorch's allocations are aligned to at least 16 bytes, and the launcher tells the compiler so.
                attributes[(position,)] = [["tt.divisibility", 16]]
            else:
                signature[argument] = "fp32" if argument in self.floats else "i32"
                if self.aligned and (argument == "vocab_size" or argument.endswith("_stride")):
                    attributes[(position,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, self.constants, attributes)


def _sequence_logps_variants(dtype, element):
    pointers = {
        "policy": element,
        "reference": element,
        "targets": "i64",
        "token_logps": "fp32",
        "sums": "fp32",
        "statistics": "fp32",
        "arrivals": "i32",
    }
    sizes = {"COLUMNS": sequence_logps.COLUMNS, "TOKENS": sequence_logps.TOKENS}
    kernel = sequence_logps.sequence_logps_kernel
    yield Variant(f"sequence_logps[{dtype},sums]", kernel, pointers, {"WITH_SUMS": True, **sizes})
    without_sums = {"WITH_SUMS": False, "sums": None, "arrivals": None, **sizes}
    yield Variant(f"sequence_logps[{dtype}]", kernel, pointers, without_sums)
    backward = {
        "grad_token_logps": "fp32",
        "logits": element,
        "targets": "i64",
        "statistics": "fp32",
        "grad_logits": element,
    }
    yield Variant(
        f"sequence_logps_backward[{dtype}]",
        sequence_logps.sequence_logps_backward_kernel,
        backward,
        {"COLUMNS": sequence_logps.COLUMNS},
    )


def _unit_gradient_variants(dtype, element):
    pointers = {
        "logits": "fp32",
        "gradient": element,
        "targets": "i64",
        "bias": element,
        "scale": "fp32",
        "logps": "fp32",
    }
    plain = {"bias": None, "scale": None, "HAS_BIAS": False, "HAS_SOFTCAP": False, "HAS_SCALE": False}
    everything = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "HAS_SCALE": True}
    for label, flags in (("", plain), (",bias,softcap,scale", everything)):
        constants = {"WITH_GRADIENT": True, "COLUMNS": sequence_logps.COLUMNS, **flags}
        yield Variant(
            f"unit_gradient[{dtype}{label}]", unit_gradient.unit_gradient_kernel, pointers, constants, ("softcap",)
        )


def variants():
    """Every kernel in every form that the ops launch."""
    found = []
    for dtype, element in _TYPES.items():
        found += _sequence_logps_variants(dtype, element)
        found += _unit_gradient_variants(dtype, element)
    # The launcher turns integers that are 1 into constants, so a single row is another program.
    single = next(v for v in found if v.name == "sequence_logps[float32,sums]")
    ones = {"num_rows": 1, "num_sequences": 1, "num_tokens": 1, "vocab_size": 1}
    found.append(replace(single, name="sequence_logps[float32,sums,ones]", constants=single.constants | ones))
    log_probs_only = {
        "gradient": None,
        "gradient_stride": 0,
        "bias": None,
        "scale": None,
        "HAS_BIAS": False,
        "HAS_SOFTCAP": False,
        "HAS_SCALE": False,
        "WITH_GRADIENT": False,
        "COLUMNS": sequence_logps.COLUMNS,
    }
    pointers = {"logits": "fp32", "targets": "i64", "logps": "fp32"}
    kernel = unit_gradient.unit_gradient_kernel
    found.append(Variant("unit_gradient[log-probs only]", kernel, pointers, log_probs_only, ("softcap",)))
    return found + [replace(v, name=f"{v.name} aligned", aligned=True) for v in found if "ones" not in v.name]


def _resource_usage(cubin):
    """Registers and local bytes (stack and spills) of the one kernel in a cubin, as cuobjdump reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def compile_variant(variant, architecture):
    """Compile for sm_`architecture`. Returns registers a thread, spilled bytes and shared memory bytes."""
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(variant.source(), target=target, options=sequence_logps.OPTIONS)
    return *_resource_usage(compiled.asm["cubin"]), compiled.metadata.shared


def _compile_by_index(index, architecture):
    return compile_variant(variants()[index], architecture)


def problems(spilled, shared, shared_limit=SHARED_LIMIT):
    """What is wrong with one compiled kernel, as a list of words; empty when all is well."""
    found = [f"spills {spilled} bytes"] if spilled else []
    return found + ([f"{shared} bytes of shared memory, more than {shared_limit}"] if shared > shared_limit else [])


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bpo_fast.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, such as 86")
    parser.add_argument("--match", default="", help="only kernels whose name holds this text")
    parser.add_argument(
        "--shared-limit", type=int, default=SHARED_LIMIT, help="bytes of shared memory a block may use"
    )
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it.")
    chosen = [(index, v.name) for index, v in enumerate(variants()) if options.match in v.name]
    if not chosen:
        parser.error(f"no kernel's name holds {options.match!r}.")
    jobs = [(index, name, architecture) for index, name in chosen for architecture in options.arch]
    width = max(len(name) for _, name in chosen)
    print(f"{'kernel':<{width}}  arch    registers  spilled  shared")
    failed = 0
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        results = pool.map(_compile_by_index, (job[0] for job in jobs), (job[2] for job in jobs))
        for (_, name, architecture), (registers, spilled, shared) in zip(jobs, results, strict=True):
            wrong = problems(spilled, shared, options.shared_limit)
            failed += bool(wrong)
            remark = f"  FAILED: {', '.join(wrong)}" if wrong else ""
            print(
                f"{name:<{width}}  sm_{architecture:<4} {registers:>9}  {spilled:>7}  {shared:>6}{remark}", flush=True
            )
    print(f"{len(jobs)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
