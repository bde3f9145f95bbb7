"""Triton and the noise extension launch where they are told: on the device of the tensors, whichever is current."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from bpo_fast import linear_token_logps, token_logps
from bpo_fast.losses import preference
from bpo_fast.losses.config import LossConfig
from bpo_fast.losses.preference import sequence_preference
from bpo_fast.ops import token_logps as logits_op
from bpo_fast.ops import unit_gradient as head_op
from bpo_fast.ops.noise import launch as noise_launch


class Launched(Exception):
    pass


@pytest.fixture
def current(monkeypatch):
    """The tensors whose device is the current one, innermost last; every tensor takes the kernels' path."""
    tensors = []

    @contextmanager
    def device_of(tensor):
        tensors.append(tensor)
        yield
        tensors.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in (logits_op, head_op, preference):
        monkeypatch.setattr(module, "runs_in_triton", lambda tensor: True)
    return tensors


def spy(monkeypatch, current, launcher, launched, stop=True):
    module = f"bpo_fast.kernels.{launcher}.launch_{launcher}"

    def launch(first, *args, **kwargs):
        launched.append((launcher, [x.data_ptr() for x in current] == [first.data_ptr()]))
        if stop:
            raise Launched

    monkeypatch.setattr(module, launch)


@pytest.mark.parametrize(
    ("dtype", "needs_grad", "launcher"),
    [
        (torch.float32, False, "unit_gradient"),
        (torch.float32, True, "unit_gradient"),
        (torch.bfloat16, True, "unit_exponentials"),
    ],
)
def test_the_head(monkeypatch, current, dtype, needs_grad, launcher):
    launched = []
    spy(monkeypatch, current, launcher, launched)
    hidden = torch.randn(3, 8, dtype=dtype, requires_grad=needs_grad)
    with pytest.raises(Launched):
        linear_token_logps(hidden, torch.randn(5, 8).to(dtype), torch.tensor([0, 4, 2]))
    assert launched == [(launcher, True)]


def test_logits_forward_and_backward(monkeypatch, current):
    launched = []
    spy(monkeypatch, current, "sequence_logps", launched, stop=False)
    spy(monkeypatch, current, "sequence_logps_backward", launched, stop=False)
    logits = torch.randn(3, 5, requires_grad=True)
    token_logps(logits, torch.tensor([0, 4, 2])).sum().backward()
    assert launched == [("sequence_logps", True), ("sequence_logps_backward", True)]


def test_the_loss(monkeypatch, current):
    launched = []
    spy(monkeypatch, current, "sigmoid_preference", launched)
    logps = torch.randn(4, requires_grad=True)
    with pytest.raises(Launched):
        sequence_preference(logps, torch.randn(4), torch.ones(4, dtype=torch.int64), LossConfig())
    assert launched == [("sigmoid_preference", True)]


def test_the_noise_extension_gets_the_device_and_its_stream(monkeypatch):
    current, calls = [0], []

    @contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    extension = SimpleNamespace(
        NoiseArguments=lambda **fields: fields,
        noise_cuda=lambda call, x_code, out_code, index, stream: calls.append((index, stream, current[-1])),
    )
    monkeypatch.setattr(noise_launch.native, "cuda_extension", lambda: extension)
    monkeypatch.setattr(torch.cuda, "device", device)
    streams = {None: 100, **{torch.device("cuda", index): 100 + index for index in range(4)}}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of=None: SimpleNamespace(cuda_stream=streams[of]))
    x = SimpleNamespace(device=torch.device("cuda", 3), dtype=torch.float32, data_ptr=lambda: 0)
    noise_launch.launch(x, x, samples=1, n=4, width=4, seed=7)
    assert calls == [(3, 103, 3)]
