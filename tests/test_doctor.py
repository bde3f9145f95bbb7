"""bpo_fast.doctor: what it reports here, and what it says of machines that lack something."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from bpo_fast import doctor
from bpo_fast.ops.noise import native


def finding(name):
    (found,) = [finding for finding in doctor.report() if finding.name == name]
    return found


class WithoutCuda:
    """An extension that was built with BPO_FAST_CUDA=off."""

    cuda_built = False
    cuda_archs = ()

    @staticmethod
    def cpu_isas():
        return ["baseline"]

    @staticmethod
    def cuda_device_count():
        return 0


def missing_extension():
    raise ImportError("bpo_fast._C is not there")


def test_this_machine(capsys):
    assert doctor.run() == 0
    lines = capsys.readouterr().out
    assert version("torch") in lines
    assert f"uses {native.extension().cpu_isas()[0]}" in lines
    assert "Everything required is installed. Next: bpo-fast demo" in lines
    for arch in native.extension().cuda_archs:
        assert arch in lines


def test_versions_come_from_the_packages_own_metadata():
    reported = {finding.name: finding for finding in doctor.report()}
    for name in ("torch", "transformers", "peft", "accelerate", "safetensors", "pillow"):
        assert reported[name].detail == version(name)
        assert reported[name].status == "ok"


def test_every_gap_has_one_line_that_fills_it(monkeypatch):
    monkeypatch.setattr(native, "extension", WithoutCuda)
    gaps = [finding for finding in doctor.report() if finding.status != "ok"]
    assert "noise op, CUDA" in [gap.name for gap in gaps]
    for gap in gaps:
        assert gap.remedy
        assert "\n" not in gap.remedy + gap.detail


def test_without_the_extension(monkeypatch, capsys):
    monkeypatch.setattr(native, "extension", missing_extension)
    assert doctor.run() == 1
    lines = capsys.readouterr().out
    assert "BROKEN   noise op, CPU" in lines
    assert "Required and broken: noise op, CPU. Next: the lines after ->" in lines


@pytest.mark.parametrize(
    ("found", "detail"), [("2.4.0", "found 2.4.0, expected >=2.11"), (None, "found none, expected >=2.11")]
)
def test_a_torch_that_is_too_old_or_missing(monkeypatch, found, detail):
    def fake_version(name):
        if name != "torch":
            return version(name)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor, "version", fake_version)
    assert finding("torch") == doctor.Finding("torch", "broken", detail, "pip install 'torch>=2.11'")
    assert doctor.run() == 1


def test_a_package_that_does_not_import(monkeypatch):
    import importlib

    real = importlib.import_module

    def fake_import(name, *rest):
        if name == "peft":
            raise RuntimeError("built for another torch\nand more")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", fake_import)
    assert finding("peft").status == "broken"
    assert finding("peft").detail.endswith("does not import: RuntimeError: built for another torch")


def test_a_driver_that_this_torch_cannot_use(monkeypatch):
    class SeesTwo(WithoutCuda):
        @staticmethod
        def cuda_device_count():
            return 2

    monkeypatch.setattr(native, "extension", SeesTwo)
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: None)
    devices = finding("devices")
    assert devices.status == "missing"
    assert "the driver shows 2" in devices.detail
    assert "pytorch.org" in devices.remedy


def test_the_cuda_half_is_required_where_torch_has_a_gpu(monkeypatch):
    monkeypatch.setattr(native, "extension", WithoutCuda)
    for torch_sees_one, status in ((True, "broken"), (False, "missing")):
        monkeypatch.setattr(doctor, "_torch_cuda", lambda seen=torch_sees_one: seen)
        assert doctor._cuda_op().status == status


@pytest.mark.parametrize(
    ("found", "said"),
    [(None, "passed over, since flash-attn does not import (ImportError: undefined symbol: _ZN3c10)"), (print, "9.9")],
)
def test_a_flash_attn_that_cannot_be_called_is_told_with_its_reason(monkeypatch, found, said):
    reason = "flash-attn does not import (ImportError: undefined symbol: _ZN3c10)"
    monkeypatch.setattr(doctor, "find_spec", lambda name: True)
    monkeypatch.setattr(doctor, "version", lambda name: "9.9")
    monkeypatch.setattr("bpo_fast.models.flash.flash_function", lambda backend: (found, reason))
    line = doctor._optional("flash-attn", "flash_attn", "kernels", "pip install 'flash-attn>=2.8'")
    assert (line.status, line.detail) == ("ok" if found else "missing", said)
    assert bool(line.remedy) == (found is None)
