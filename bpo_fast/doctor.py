"""What this machine has, what bpo-fast will use of it, and the one line that installs what is missing."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from bpo_fast.ops.noise import native

# Required packages that can be installed and still fail to import, as when two of them do not fit.
_IMPORTED = ("torch", "transformers", "peft", "accelerate", "datasets")
# Distribution, import name, what it is for, the line that installs it; README has the same lines.
_OPTIONAL = (
    ("bitsandbytes", "bitsandbytes", "4-bit base models (QLoRA)", "pip install 'bitsandbytes>=0.48'"),
    (
        "flash-attn",
        "flash_attn",
        "FlashAttention's own variable-length kernels",
        "pip install 'flash-attn>=2.8' --no-build-isolation",
    ),
    ("matplotlib", "matplotlib", "charts in the demo's report", "pip install 'matplotlib>=3.9'"),
    ("openai", "openai", "errors injected by a server", "pip install 'openai>=3.57'"),
    ("ray", "ray", "bootstrapping on a Ray cluster", "pip install 'ray[data]>=2.40'"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: "ok", "missing" (something optional) or "broken" (something required).
        detail: what was found.
        remedy: the one line that fixes it; empty where nothing has to be done.
    """

    name: str
    status: str
    detail: str
    remedy: str = ""


def report() -> list[Finding]:
    """Everything `bpo-fast doctor` prints; each check stands alone, so that one broken package hides no other.

    Example:
        >>> "python" in [finding.name for finding in report()]
        True
    """
    python = Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    machine = [_devices(), _cpu_op(), _cuda_op(), _attention("cpu"), _attention("cuda")]
    return [python, *_required(), *machine, *(_optional(*optional) for optional in _OPTIONAL)]


def run() -> int:
    """Print the report; 0, or 1 if something required is broken."""
    findings = report()
    marks = {"ok": "ok     ", "missing": "missing", "broken": "BROKEN "}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{marks[finding.status]}  {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            print(f"{'':7}  {'':<{width}}  -> {finding.remedy}")
    broken = [finding.name for finding in findings if finding.status == "broken"]
    if broken:
        print(f"\nRequired and broken: {', '.join(broken)}. Next: the lines after ->, then bpo-fast doctor again")
    else:
        print("\nEverything required is installed. Next: bpo-fast demo")
    return 1 if broken else 0


def _required():
    """A finding for each dependency in bpo-fast's own metadata, extras aside."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [Finding("packaging", "broken", "found none, expected it to compare versions", "pip install packaging")]
    requirements = [Requirement(line) for line in requires("bpo-fast") or ()]
    return [_dependency(r) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def _dependency(requirement):
    name, remedy = requirement.name, f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "broken", f"found none, expected {requirement.specifier}", remedy)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(name, "broken", f"found {found}, expected {requirement.specifier}", remedy)
    if name in _IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # a package can fail to import in any way; the report says so and continues
            return Finding(name, "broken", f"{found} does not import: {_first_line(error)}", remedy)
    return Finding(name, "ok", found)


def _optional(name, module, purpose, remedy):
    if find_spec(module) is None:
        return Finding(name, "missing", f"found none; adds {purpose}", remedy)
    if module == "flash_attn":
        from bpo_fast.models.flash import flash_function

        function, found = flash_function(module)
        if function is None:
            return Finding(name, "missing", f"passed over, since {found}", remedy)
    try:
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        return Finding(name, "ok", "installed, version unknown")


def _torch_cuda():
    """The torch module if it sees a CUDA device, else None."""
    if find_spec("torch") is None:
        return None
    import torch

    return torch if torch.cuda.is_available() else None


def _devices():
    torch = _torch_cuda()
    if torch is None:
        try:
            seen = native.extension().cuda_device_count()
        except ImportError:
            seen = 0
        detail = f"{os.cpu_count()} CPU cores ({platform.machine()}); torch sees no CUDA device"
        if not seen:
            return Finding("devices", "ok", detail)
        detail += f", but the driver shows {seen}; this torch was built without CUDA, or for a newer driver"
        remedy = "install the CUDA build of torch from https://pytorch.org/get-started/locally"
        return Finding("devices", "missing", detail, remedy)
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        names.append(f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    return Finding("devices", "ok", "; ".join(names))


def _cpu_op():
    try:
        isas = native.extension().cpu_isas()
    except ImportError as error:
        return Finding("noise op, CPU", "broken", _first_line(error), "pip install --force-reinstall --no-deps .")
    return Finding("noise op, CPU", "ok", f"uses {isas[0]} (this processor runs {', '.join(isas)})")


def _cuda_op():
    name = "noise op, CUDA"
    try:
        module = native.extension()
    except ImportError:
        return Finding(name, "missing", "the whole native extension is missing")
    if module.cuda_built:
        return Finding(name, "ok", f"built for {', '.join(module.cuda_archs)}")
    status = "broken" if _torch_cuda() else "missing"
    return Finding(name, status, "not built", native.REBUILD_WITH_CUDA)


def _attention(device_type):
    name = f"attention on {device_type}"
    try:
        from bpo_fast.models.flash import choose_backend

        backend, reason = choose_backend(device_type)
    except Exception as error:  # transformers or torch broken: reported above
        return Finding(name, "broken", f"cannot be chosen: {_first_line(error)}")
    return Finding(name, "ok", f"{backend}: {reason}")


def _first_line(error):
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
