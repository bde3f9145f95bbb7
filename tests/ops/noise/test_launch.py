"""The call into the extension: which device and stream it takes, and what it refuses to hand over by address."""

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch

from bpo_fast.ops.noise import native
from bpo_fast.ops.noise.launch import launch

SIZES = {"samples": 2, "n": 6, "width": 3, "x_stride": 6, "out_stride": 3, "seed": 0}
RIGHT = {
    "scales": torch.ones(1, 2),
    "steps": torch.zeros(2, dtype=torch.int64),
    "ids": torch.zeros(2, dtype=torch.int64),
    "source": torch.zeros(2, dtype=torch.int64),
    "out_rows": torch.arange(4),
}


@pytest.fixture
def gpu(monkeypatch):
    """A machine with several GPUs, the first being current, as far as the launch sees it; what was done on it."""
    seen = SimpleNamespace(current=torch.device("cuda:0"), calls=[])

    @contextlib.contextmanager
    def device(wanted):
        before, seen.current = seen.current, wanted
        yield
        seen.current = before

    def noise_cuda(arguments, x_dtype, out_dtype, device, stream):
        seen.calls.append((seen.current, (x_dtype, out_dtype), device, stream))

    extension = SimpleNamespace(NoiseArguments=dict, noise_cuda=noise_cuda)
    streams = {torch.device("cuda:0"): 0x100, torch.device("cuda:1"): 0x111}
    monkeypatch.setattr(native, "cuda_extension", lambda: extension)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device=None: SimpleNamespace(cuda_stream=streams[seen.current if device is None else device]),
    )
    return seen


@pytest.mark.parametrize("index", [0, 1])
def test_device_and_stream_are_those_of_x(gpu, index):
    """Also where another device is current, as in a process that drives several GPUs."""
    device = torch.device("cuda", index)
    x = SimpleNamespace(device=device, dtype=torch.bfloat16, data_ptr=lambda: 64)
    out = SimpleNamespace(device=device, dtype=torch.float32, data_ptr=lambda: 128)
    launch(x, out, **SIZES)
    assert gpu.calls == [(device, (1, 0), index, (0x100, 0x111)[index])]
    assert gpu.current == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"steps": torch.zeros(2, dtype=torch.int32)}, "steps: found 2 of torch.int32, expected 2 of torch.int64."),
        ({"steps": torch.zeros(1, dtype=torch.int64)}, "steps: found 1 of torch.int64, expected 2 of torch.int64."),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "ids: found 3 of torch.int64, expected 2 of torch.int64."),
        ({"source": torch.zeros(2)}, "source: found 2 of torch.float32, expected 2 of torch.int64."),
        ({"out_rows": torch.arange(3)}, "out_rows: found 3 of torch.int64, expected 4 of torch.int64."),
        ({"scales": torch.ones(1, 2).double()}, "scales: found 2 of torch.float64, expected 2 of torch.float32."),
        ({"levels": 3, "ladder": True}, "steps: found 2 of torch.int64, expected 3 of torch.int64."),
    ],
)
def test_operands_that_would_be_read_past_their_end_are_refused(wrong, sentence):
    x = torch.zeros(2, 6)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        launch(x, torch.zeros(4, 3), **SIZES, **RIGHT | wrong)


def test_out_on_another_device_is_refused():
    with pytest.raises(ValueError, match=r"^out: found on meta, expected on cpu, the device of x\.$"):
        launch(torch.zeros(2, 6), torch.zeros(2, 6, device="meta"), **SIZES, **RIGHT)
