"""Runs the bodies of the tests marked `gpu` on a CPU, so that a typing error in one does not wait for a card.

`python -m pytest -p gpu_rehearsal -m gpu`: what goes to a CUDA device goes to the CPU, whose ops stand in for CUDA's;
with TRITON_INTERPRET=1 Triton's kernels are interpreted instead. Nothing of it holds for a GPU. Peers are taken for
missing, as they may be there.
"""

import sys
from importlib.abc import MetaPathFinder

import pytest
import torch
import triton
from torch.overrides import TorchFunctionMode

PEERS = ("trl", "liger_kernel")
# An interpreter is slow, and rounds to bfloat16 otherwise.
LARGEST_VOCABULARY = {True: 200, False: 3000}


def on_cpu(value):
    """A device that is CUDA's becomes the CPU; anything else stays."""
    if isinstance(value, str | torch.device) and str(value).split(":")[0] == "cuda":
        return torch.device("cpu")
    return value


class CudaIsCpu(TorchFunctionMode):
    """Every call of PyTorch that names a CUDA device gets the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0].clone()
        moved, options = [on_cpu(value) for value in args], {n: on_cpu(v) for n, v in (kwargs or {}).items()}
        result = func(*moved, **options)
        # A tensor brought to a GPU is a new one, which the other tensor's changes do not reach.
        goes = func is torch.Tensor.to and [*moved, *options.values()] != [*args, *(kwargs or {}).values()]
        return result.clone() if goes and result is args[0] else result


class WithoutPeers(MetaPathFinder):
    """Finds no package of a peer."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PEERS:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def pytest_configure():
    sys.meta_path.insert(0, WithoutPeers())


def pytest_collection_modifyitems(items):
    interpreted = triton.knobs.runtime.interpret
    for item in items:
        if item.get_closest_marker("gpu") is None:
            continue
        for node in item.listchain():
            node.own_markers = [mark for mark in node.own_markers if mark.name != "skipif"]
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        large = parameters.get("vocab_size", 0) > LARGEST_VOCABULARY[interpreted]
        needs = [name for mark in item.iter_markers("gpu") for name in mark.args]
        if needs and not (interpreted and needs == ["Triton"]):
            item.add_marker(pytest.mark.skip(reason=f"not rehearsed: needs {' and '.join(needs)}"))
        elif large or (interpreted and parameters.get("dtype") == torch.bfloat16):
            item.add_marker(pytest.mark.skip(reason="not rehearsed: a larger or coarser form of another"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    said = str(call.excinfo.value) if call.excinfo else ""
    if report.failed and ("not compiled with CUDA" in said or "Found no NVIDIA driver" in said):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1], "Skipped: not rehearsed: needs CUDA itself")
    return report


@pytest.fixture(autouse=True)
def cuda_is_cpu(monkeypatch):
    """Sends what goes to CUDA to the CPU, and there all but float64 to the kernels if they are interpreted."""
    for name, module in list(sys.modules.items()):
        if name.startswith("bpo_fast") and hasattr(module, "runs_in_triton") and triton.knobs.runtime.interpret:
            monkeypatch.setattr(module, "runs_in_triton", lambda tensor: tensor.dtype != torch.float64)
    with CudaIsCpu():
        yield
