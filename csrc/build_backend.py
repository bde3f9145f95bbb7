"""The build backend: setuptools, and the CUDA compiler as a build requirement where it is wanted and missing.

`BPO_FAST_CUDA` decides about the CUDA half of the extension:
auto (default)  built if nvcc is on the machine; nvcc is fetched from the package index if there is only a driver
on              always built; nvcc is fetched if it is missing
off             never built
"""

import importlib.metadata
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (a backend is the hooks its module has)

# By its path: neither this package nor what it needs is installed yet.
_TABLE = runpy.run_path(str(Path(__file__).parents[1] / "kernels" / "architectures.py"))["ARCHITECTURES"]
ARCHS = tuple(_TABLE)
MIN_CUDA = max(architecture.cuda for architecture in _TABLE.values())
MIN_NVCC = f"nvcc of CUDA {MIN_CUDA[0]}.{MIN_CUDA[1]} or later"
NVCC_REQUIREMENTS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]
# Of every compilation of a .cu file: the bits of the noise op need --fmad=false.
NVCC_FLAGS = ["-O3", "-std=c++17", "-DBPO_CUDA", "--fmad=false"]


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its compiler and the folder that holds include/ and lib/ (or lib64/)."""

    nvcc: str
    root: Path

    @property
    def library_dir(self) -> Path:
        """Folder of the static CUDA runtime."""
        for folder in (self.root / "lib64", self.root / "lib", *sorted(self.root.glob("targets/*/lib"))):
            if (folder / "libcudart_static.a").is_file():
                return folder
        raise SystemExit(
            f"libcudart_static.a: found none under {self.root}, expected the static CUDA runtime of {self.nvcc}; "
            "install the CUDA runtime's development files or set BPO_FAST_CUDA=off."
        )


def cuda_mode() -> str:
    mode = os.environ.get("BPO_FAST_CUDA", "auto").strip().lower() or "auto"
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"BPO_FAST_CUDA: found '{mode}', expected auto, on or off.")
    if mode == "on" and platform.system() != "Linux":
        raise SystemExit(f"BPO_FAST_CUDA: found on, expected auto or off on {platform.system()}.")
    return mode if platform.system() == "Linux" else "off"


def _installed_nvcc():
    """nvcc of the package nvidia-cuda-nvcc, which is not on PATH."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "nvcc" and file.parent.name == "bin"), None)


def find_toolkit() -> Toolkit | None:
    """The first usable CUDA toolkit of: CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, the package index's; or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes if home]
    candidates += [shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin"), _installed_nvcc()]
    for nvcc in filter(None, candidates):
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        release = re.search(r"release (\d+)\.(\d+)", version.stdout)
        if not release or (int(release[1]), int(release[2])) < MIN_CUDA:
            print(f"{nvcc}: found {release and release[0]}, expected {MIN_NVCC}; it is not used.", file=sys.stderr)
            continue
        # nvcc on PATH may be a wrapper or a link elsewhere; nvcc itself says where its toolkit is.
        dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False)
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
        return Toolkit(nvcc, Path(top[1].strip() if top else Path(nvcc).resolve().parents[1]).resolve())
    return None


def _has_driver():
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def _cuda_requirements():
    mode = cuda_mode()
    wanted = mode == "on" or (mode == "auto" and _has_driver())
    return NVCC_REQUIREMENTS if wanted and find_toolkit() is None else []


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_cuda_requirements()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *_cuda_requirements()]


def toolkit_for_build() -> Toolkit | None:
    """The toolkit to build the CUDA half with, or None where it is not to be built."""
    mode = cuda_mode()
    if mode == "off":
        return None
    toolkit = find_toolkit()
    if toolkit is None and mode == "on":
        raise SystemExit(
            f"BPO_FAST_CUDA: found on without a compiler, expected {MIN_NVCC}; install one, set CUDA_HOME, or build "
            "without --no-build-isolation so that pip fetches it."
        )
    return toolkit


def compile_cuda(toolkit: Toolkit, source: Path, output: Path) -> None:
    """Compile one .cu file to an object with code for every architecture and PTX of the last."""
    command = [toolkit.nvcc, "-c", str(source), "-o", str(output), *NVCC_FLAGS]
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]
    command += ["-I", str(toolkit.root / "include"), "--threads", "0"]
    for arch in ARCHS:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-gencode", f"arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}"]
    print(" ".join(command), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(
            f"{source}: found exit code {code} from {toolkit.nvcc}, expected 0; "
            "set BPO_FAST_CUDA=off to build without the CUDA half."
        )
