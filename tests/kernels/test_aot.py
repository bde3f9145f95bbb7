import re
from dataclasses import replace
from importlib.metadata import version

import pytest

from bpo_fast.kernels import aot
from bpo_fast.kernels.occupancy import occupancy


def test_the_table_and_its_exit_code(capsys):
    assert aot.main(["--arch", "86", "--match", "sequence_logps[bfloat16,sums]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    columns = ["kernel", "arch", "warps", "registers", "spilled", "shared", "instructions", "occupancy"]
    assert lines[0].split() == columns
    name, arch, warps, registers, spilled, shared, instructions, share = lines[1].split()[:8]
    assert (name, arch, spilled) == ("sequence_logps[bfloat16,sums]", "sm_86", "0")
    found = occupancy(86, int(registers), int(shared), int(warps))
    assert share == f"{100 * int(warps) * found.blocks // 48}%"
    assert 0 < int(registers) <= 255
    assert 0 < int(shared) <= aot.SHARED_LIMIT
    # An exponential, a maximum, two additions and a multiplication are the least of a logit.
    assert 5 < float(instructions) < 40
    assert "aligned" in lines[2]
    assert lines[-1] == "2 compiled, 0 failed"


def test_too_much_shared_memory_fails(capsys):
    arguments = ["--arch", "86", "--match", "sequence_logps[bfloat16,sums] aligned"]
    assert aot.main([*arguments, "--shared-limit", "8"]) == 1
    assert re.search(r"FAILED: \d+ bytes of shared memory, more than 8\n", capsys.readouterr().out)


def test_a_spill_is_a_problem():
    assert aot.problems(aot.Usage(registers=40, spilled=8, shared=0, instructions=9.0)) == ["spills 8 bytes"]
    assert aot.problems(aot.Usage(registers=40, spilled=0, shared=aot.SHARED_LIMIT, instructions=9.0)) == []
    assert len(aot.problems(aot.Usage(registers=40, spilled=8, shared=aot.SHARED_LIMIT + 1, instructions=9.0))) == 2


def test_unknown_kernel_is_named(capsys):
    with pytest.raises(SystemExit):
        aot.main(["--match", "nothing"])
    assert "--match: found 'nothing', expected a part of a kernel's name." in capsys.readouterr().err


def small_table(monkeypatch):
    """One kernel for two architectures stands for the table, so that a test compiles none."""
    (variant,) = (v for v in aot.variants() if v.name == "sequence_logps[bfloat16]")
    usages = {80: aot.Usage(32, 0, 0, 8.0), 86: aot.Usage(41, 0, 32, 8.52)}
    monkeypatch.setattr(aot, "ARCHITECTURES", usages)
    return [(replace(variant, options={"num_warps": 8}), usages)]


def test_the_kept_table(monkeypatch):
    lines = aot.markdown(small_table(monkeypatch)).splitlines()
    assert lines[-3:] == [
        "| kernel | warps | bytes | sm_80 | sm_86 |",
        "| --- | ---: | ---: | --- | --- |",
        # 41 registers: 5 blocks of 8 warps of the 48 of sm_86.
        "| `sequence_logps[bfloat16]` | 8 | 2 | 32 · 0 · 100% · 8.0 | 41 · 32 · 83% (registers) · 8.5 |",
    ]
    assert f"triton {version('triton')}" in lines[2]


def test_a_table_that_differs_is_told_in_one_sentence(tmp_path, monkeypatch):
    made = aot.markdown(small_table(monkeypatch))
    path = tmp_path / "table.md"
    remedy = f"run `{aot.COMMAND} --markdown {path}` and keep the result."
    assert aot.difference(path, made) == f"{path}: found no file, expected the kept table; {remedy}"
    path.write_text(made)
    assert aot.difference(path, made) == ""
    path.write_text(made.replace("41 · 32", "40 · 32"))
    assert aot.difference(path, made).startswith(f"{path}: found 1 lines that differ, expected first '| `seq")
    path.write_text(made + "| more |\n")
    assert aot.difference(path, made) == f"{path}: found lines that are not made any more, expected none; {remedy}"
    path.write_text(made.replace(f"triton {version('triton')}", "triton 1.0.0"))
    assert aot.difference(path, made).startswith(f"{path}: found a table of triton 1.0.0, expected one of triton ")


def test_sass_of_one_kernel(capsys):
    assert aot.main(["--sass", "sequence_logps[bfloat16,sums] aligned", "--arch", "86"]) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = {words[0]: tuple(map(int, words[1:])) for words in map(str.split, lines[lines.index("") + 2 :])}
    marked = [line for line in lines if line.startswith(">")]
    assert counts["sum"][0] == len(marked) > 20
    # The loop over a row reads 16 bytes a thread and access, and takes one exponential a logit and one a lane.
    assert counts["LDG.E.128"][0] >= 1
    assert counts["MUFU.EX2"][0] >= 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "table.md", "--arch", "86"], "--arch or --match: found with --markdown or --check, expected"),
        (["--sass", "sequence_logps[bfloat16,sums]"], "--arch: found 0 with --sass, expected one, such as --arch 86."),
        (["--sass", "nothing", "--arch", "86"], "--sass: found 'nothing', expected one of sequence_logps[float32],"),
    ],
)
def test_options_that_do_not_fit_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        aot.main(arguments)
    assert message in capsys.readouterr().err
