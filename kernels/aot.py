"""Compile every kernel for every supported architecture, without a GPU: `python -m bpo_fast.kernels.aot`.

Prints a line for each variant of a kernel and each architecture. Ends with code 1 if anything spills, or needs more
shared memory than the smallest of these architectures gives a block, or differs from the table of `--check PATH`.
"""

import argparse
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from bpo_fast.kernels import sass
from bpo_fast.kernels.architectures import ARCHITECTURES
from bpo_fast.kernels.occupancy import occupancy
from bpo_fast.kernels.variants import Variant, variants

# Bytes of shared memory that a block may use on every architecture.
SHARED_LIMIT = min(architecture.shared_per_block for architecture in ARCHITECTURES.values())
COMMAND = "python -m bpo_fast.kernels.aot"


class Usage(NamedTuple):
    """What one compiled kernel uses.

    Registers a thread, spilled bytes a thread, bytes of shared memory a block; instructions of its longest loop for
    each logit that the loop loads, 0 where there is no loop over a row.
    """

    registers: int
    spilled: int
    shared: int
    instructions: float


def _compile(variant, architecture):
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(variant.source(), target=target, options=variant.options)


def compile_variant(variant: Variant, architecture: int) -> Usage:
    """Compile for sm_`architecture` and return its `Usage`, as cuobjdump reports it of the one kernel in the cubin."""
    compiled = _compile(variant, architecture)
    text = sass.cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    loop = sass.longest_loop(sass.instructions(sass.cuobjdump(compiled.asm["cubin"])))
    # The compiler unrolls further than it is told to, so the loads of the loop itself say how many logits it takes.
    logits = sass.loaded_bytes(loop) / variant.loads_a_logit if variant.loads_a_logit else 0
    instructions = len(loop) / logits if logits else 0.0
    return Usage(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, instructions)


def _compile_by_index(index, architecture):
    return compile_variant(variants()[index], architecture)


def problems(usage: Usage, shared_limit: int = SHARED_LIMIT) -> list[str]:
    """What is wrong with one compiled kernel; empty if nothing is."""
    found = [f"spills {usage.spilled} bytes"] if usage.spilled else []
    too_much = f"{usage.shared} bytes of shared memory, more than {shared_limit}"
    return found + ([too_much] if usage.shared > shared_limit else [])


def _occupancy_words(variant, architecture, usage):
    found = occupancy(architecture, usage.registers, usage.shared, variant.num_warps)
    return f"{found.share:.0%}" + ("" if found.limited_by == "warps" else f" ({found.limited_by})")


def markdown(table: list[tuple[Variant, dict[int, Usage]]]) -> str:
    """The kept table, from each variant's usage on every architecture of `ARCHITECTURES`."""
    lines = [
        "# What every kernel uses",
        "",
        f"Compiled ahead of time with triton {version('triton')} by `{COMMAND} --markdown docs/kernels-aot.md`, which",
        "made this file; `--check docs/kernels-aot.md` says whether it is still true.",
        "",
        "Bytes are those read and written for a logit; what is read twice counts twice, though a cache may serve it.",
        "A cell is registers a thread · bytes of shared memory a block · theoretical occupancy, that is warps that a",
        "multiprocessor holds at once, of those it could · instructions a logit, the static count of the longest loop",
        "with the branches in it. What does not let it hold more warps is in brackets, unless it is their number",
        "itself. Bytes spilled from registers to local memory would stand behind.",
        "",
        f"| kernel | warps | bytes | {' | '.join(f'sm_{architecture}' for architecture in ARCHITECTURES)} |",
        f"| --- | ---: | ---: |{' --- |' * len(ARCHITECTURES)}",
    ]
    for variant, usages in table:
        cells = [
            f"{usage.registers} · {usage.shared} · {_occupancy_words(variant, architecture, usage)}"
            + (f" · {usage.instructions:.1f}" if usage.instructions else "")
            + (f" · spills {usage.spilled}" if usage.spilled else "")
            for architecture, usage in usages.items()
        ]
        moved = variant.bytes_a_logit or ""
        lines.append(f"| `{variant.name}` | {variant.num_warps} | {moved} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def difference(path: Path, made: str) -> str:
    """One sentence on how the table kept at `path` differs from `made`; empty if it does not."""
    remedy = f"run `{COMMAND} --markdown {path}` and keep the result."
    if not path.exists():
        return f"{path}: found no file, expected the kept table; {remedy}"
    kept = path.read_text()
    if kept == made:
        return ""
    kept_version = re.search(r"with triton (\S+)", kept)
    if kept_version and kept_version[1] != version("triton"):
        found = f"found a table of triton {kept_version[1]}, expected one of triton {version('triton')}"
        return f"{path}: {found}; install triton {kept_version[1]}, or {remedy}"
    new = [line for line in made.splitlines() if line not in kept.splitlines()]
    if not new:
        return f"{path}: found lines that are not made any more, expected none; {remedy}"
    return f"{path}: found {len(new)} lines that differ, expected first {new[0]!r}; {remedy}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, metavar="86", help="default: all")
    parser.add_argument("--match", default="", help="only kernels whose name holds this text")
    parser.add_argument("--shared-limit", type=int, default=SHARED_LIMIT, help="bytes of shared memory a block")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--markdown", type=Path, metavar="PATH", help="write the table to this file")
    action.add_argument("--check", type=Path, metavar="PATH", help="compare the table with this file")
    action.add_argument("--sass", metavar="NAME", help="print the machine code of this kernel; needs one --arch")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET: found it set, expected a compiler; unset it.")
    if (options.markdown or options.check) and (options.arch or options.match):
        parser.error("--arch or --match: found with --markdown or --check, expected the whole table; leave them out.")
    names = [variant.name for variant in variants()]
    if options.sass and options.sass not in names:
        parser.error(f"--sass: found {options.sass!r}, expected one of {', '.join(names)}.")
    if options.sass and len(options.arch or ()) != 1:
        parser.error(f"--arch: found {len(options.arch or ())} with --sass, expected one, such as --arch 86.")
    if not any(options.match in name for name in names):
        parser.error(f"--match: found {options.match!r}, expected a part of a kernel's name.")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.sass:
        (variant,) = (v for v in variants() if v.name == options.sass)
        print(sass.report(sass.instructions(sass.cuobjdump(_compile(variant, *options.arch).asm["cubin"]))))
        return 0
    chosen = [(index, variant) for index, variant in enumerate(variants()) if options.match in variant.name]
    architectures = options.arch or tuple(ARCHITECTURES)
    jobs = [(index, architecture) for index, _ in chosen for architecture in architectures]
    width = max(len(variant.name) for _, variant in chosen)
    print(f"{'kernel':<{width}}  arch    warps  registers  spilled  shared  instructions  occupancy")
    failed, table = 0, []
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        results = pool.map(_compile_by_index, *zip(*jobs, strict=True))
        for _, variant in chosen:
            usages = {}
            table.append((variant, usages))
            for architecture in architectures:
                usages[architecture] = usage = next(results)
                wrong = problems(usage, options.shared_limit)
                failed += bool(wrong)
                numbers = f"{variant.num_warps:>5}  {usage.registers:>9}  {usage.spilled:>7}  {usage.shared:>6}"
                numbers += f"  {usage.instructions:>12.1f}"
                words = "  ".join([numbers, _occupancy_words(variant, architecture, usage)])
                remark = f"  FAILED: {', '.join(wrong)}" if wrong else ""
                print(f"{variant.name:<{width}}  sm_{architecture:<4} {words}{remark}", flush=True)
    print(f"{len(jobs)} compiled, {failed} failed")
    if options.markdown:
        temporary = options.markdown.with_name(f".{options.markdown.name}.{os.getpid()}")
        temporary.write_text(markdown(table))
        temporary.replace(options.markdown)
    behind = difference(options.check, markdown(table)) if options.check else ""
    if behind:
        print(behind, file=sys.stderr)
    return 1 if failed or behind else 0


if __name__ == "__main__":
    sys.exit(main())
