import pytest

from bpo_fast.kernels import aot


def test_the_table_and_its_exit_code(capsys):
    assert aot.main(["--arch", "86", "--match", "sequence_logps[bfloat16,sums]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kernel", "arch", "registers", "spilled", "shared"]
    name, arch, registers, spilled, shared = lines[1].split()
    assert (name, arch, spilled) == ("sequence_logps[bfloat16,sums]", "sm_86", "0")
    assert 0 < int(registers) <= 255
    assert 0 < int(shared) <= aot.SHARED_LIMIT
    assert "aligned" in lines[2]
    assert lines[-1] == "2 compiled, 0 failed"


def test_too_much_shared_memory_fails(capsys):
    arguments = ["--arch", "86", "--match", "sequence_logps[bfloat16,sums] aligned"]
    assert aot.main([*arguments, "--shared-limit", "8"]) == 1
    assert "FAILED: 32 bytes of shared memory, more than 8" in capsys.readouterr().out


def test_a_spill_is_a_problem():
    assert aot.problems(spilled=8, shared=0) == ["spills 8 bytes"]
    assert aot.problems(spilled=0, shared=aot.SHARED_LIMIT) == []
    assert len(aot.problems(spilled=8, shared=aot.SHARED_LIMIT + 1)) == 2


def test_every_kernel_has_a_variant():
    from bpo_fast.kernels import sequence_logps, unit_gradient

    kernels = {name for module in (sequence_logps, unit_gradient) for name in vars(module) if name.endswith("_kernel")}
    assert {variant.kernel.__name__ for variant in aot.variants()} == kernels


def test_unknown_kernel_is_named(capsys):
    with pytest.raises(SystemExit):
        aot.main(["--match", "nothing"])
    assert "no kernel's name holds 'nothing'" in capsys.readouterr().err
