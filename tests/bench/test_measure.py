"""How benchmarks time and compare candidates, and who the peers are. No time is asserted."""

from types import SimpleNamespace

import pytest
import torch
from benching import Progress


def test_functions_run_in_turn_and_the_order_rotates():
    from measure import interleaved

    calls, progress = [], Progress()
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = interleaved(functions, warmup=1, repeats=2, calls=2, progress=progress)
    assert "".join(calls[::2]) == "cab" + "abc" + "bca"
    assert calls[::2] == calls[1::2]
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 2, "b": 2, "c": 2}
    assert progress.n == 9
    assert interleaved({}, 1, 2, 1, progress) == {}


def test_samples_become_median_quartiles_and_ratios():
    from measure import add_ratios, summary

    assert summary([4.0, 1.0, 2.0, 3.0]) == {
        "seconds": [4.0, 1.0, 2.0, 3.0],
        "median": 2.5,
        "quartiles": [1.75, 3.25],
        "min": 1.0,
        "max": 4.0,
    }
    rows = {
        "bpo_fast": {"median": 1.0, "peak_bytes": 30},
        "eager": {"median": 4.0, "peak_bytes": 60, "floor": "clone"},
        "absent": {"missing": "CUDA only"},
        "floor": {"median": 0.5},
        "clone": {"median": 2.0},
    }
    add_ratios(rows, "eager", "floor")
    assert rows["bpo_fast"] == {
        "median": 1.0,
        "peak_bytes": 30,
        "time_ratio": 0.25,
        "peak_ratio": 0.5,
        "floor_ratio": 2.0,
    }
    assert rows["eager"]["floor_ratio"] == 2.0
    assert rows["absent"] == {"missing": "CUDA only"}
    assert rows["clone"] == {"median": 2.0, "time_ratio": 0.5, "floor_ratio": 4.0}


def test_extra_peak_sees_a_block_that_is_gone_again():
    from measure import extra_peak

    def step():
        torch.ones(64 << 18)

    assert 60 << 20 < extra_peak(step, "cpu") < 100 << 20


def test_a_candidate_that_differs_fails_or_cannot_run_is_said():
    from measure import Candidate, Operation
    from operations import LINEAR_LOGPS, loss

    ours = LINEAR_LOGPS.candidates["bpo_fast"]

    def wrong(problem):
        step = ours.setup(problem)
        return lambda: tuple(1.01 * value for value in step())

    candidates = {
        "bpo_fast": ours,
        "eager": LINEAR_LOGPS.candidates["eager"],
        "wrong": Candidate(wrong),
        "broken": loss(lambda problem: problem.no_such_name),
        "absent": Candidate(None, package="no_such_package"),
        "elsewhere": Candidate(None, cuda_only=True),
        "floor": LINEAR_LOGPS.candidates["floor"],
    }
    options = SimpleNamespace(device="cpu", dtype="float32", warmup=0, repeats=2, policy_tokens=16, hidden_size=16)
    options.vocab_size, options.response_fraction = 64, 0.5
    operation = Operation("op", "job", LINEAR_LOGPS.shape, LINEAR_LOGPS.problem, candidates, with_peak=False)
    steps, job = operation.job(options)
    progress = Progress()
    made = job(progress)
    rows = made["rows"]
    assert made["shape"] == {"tokens": 16, "H": 16, "V": 64}
    assert rows["bpo_fast"]["agrees"]
    assert not rows["wrong"]["agrees"]
    assert rows["wrong"]["loss_error"] == pytest.approx(0.01, rel=1e-2)
    assert rows["wrong"]["gradient_error"] == pytest.approx(0.01, rel=1e-2)
    assert rows["broken"]["missing"].startswith("failed: AttributeError")
    assert rows["absent"] == {"missing": "no_such_package is not installed"}
    assert rows["elsewhere"] == {"missing": "CUDA only"}
    assert rows["floor"]["is_floor"]
    assert "loss" not in rows["floor"]
    assert len(rows["wrong"]["seconds"]) == 2
    assert progress.n <= steps == 7 * 3


def test_every_peer_stays():
    from operations import DPO, LINEAR_DPO, LINEAR_LOGPS, operations

    assert {"torch.compile", "TRL fused head", "Liger DPO, trained head", "eager, trained head"} < set(
        LINEAR_DPO.candidates
    )
    names = {
        "cut-cross-entropy",
        "cut-cross-entropy, torch_compile",
        "Liger fused linear CE",
        "torch linear_cross_entropy",
    }
    assert names | {"torch linear_cross_entropy, chunked", "TRL fused head"} < set(LINEAR_LOGPS.candidates)
    assert {"bpo_fast, in place", "Liger CE, in place", "torch.compile"} < set(DPO.candidates)
    found = operations(SimpleNamespace(decode_rows=[1, 4]))
    assert list(found)[3:] == ["token_logps, 1 row", "token_logps, 4 rows"]
    few = found["token_logps, 4 rows"].candidates
    assert {"F.cross_entropy", "TRL selective_log_softmax"} < set(few)
    assert LINEAR_LOGPS.candidates["cut-cross-entropy"].package == "cut_cross_entropy"
    assert LINEAR_DPO.candidates["Liger DPO, trained head"].package == "liger_kernel"


def test_calls_rotate_among_the_copies_of_a_problem(monkeypatch):
    from measure import Candidate, Operation

    seen, numbers = [], iter(range(9))
    candidate = Candidate(lambda problem: lambda: seen.append(problem))
    operation = Operation(
        "op", "what", lambda o: {}, lambda o, shape: next(numbers), {"a": candidate}, with_peak=False, compared=False
    )
    options = SimpleNamespace(warmup=0, repeats=2, copies=3, device="cpu", dtype="float32")
    operation.measure(options, ["a"], (), Progress())
    assert seen == [0, 1, 2, 0, 1]  # the first step of each, then one call a repeat


def test_times_of_a_gpu_are_those_of_its_events_with_an_empty_cache(monkeypatch):
    import measure

    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")

        def elapsed_time(self, end):
            return 6.0

    class Buffer:
        def zero_(self):
            happened.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    found = measure.elapsed(lambda: happened.append("call"), 3, Buffer())
    assert found == pytest.approx(0.002)  # 6 ms of three calls
    assert happened == ["flush", "record", "call", "call", "call", "record"]
