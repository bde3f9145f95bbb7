"""The extension bpo_fast._C and the packages; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
from build_backend import ARCHS, compile_cuda, toolkit_for_build


class BuildExt(build_ext):
    """Adds the CUDA half to the extension, in the same shared object, where build_backend finds that it is wanted."""

    def build_extension(self, ext):
        toolkit = toolkit_for_build()
        if toolkit:
            output = Path(self.build_temp) / "noise_cuda.o"
            output.parent.mkdir(parents=True, exist_ok=True)
            compile_cuda(toolkit, Path("csrc/noise_cuda.cu"), output)
            archs = " ".join([*(f"sm_{arch}" for arch in ARCHS), f"compute_{ARCHS[-1]}"])
            ext.define_macros += [("BPO_CUDA", None), ("BPO_CUDA_ARCHS", f'"{archs}"')]
            ext.extra_objects += [str(output)]
            ext.library_dirs += [str(toolkit.library_dir)]
            ext.libraries += ["cudart_static", "rt", "dl"]
            # The static runtime's symbols stay inside, away from the shared one that torch loads.
            ext.extra_link_args += ["-Wl,--exclude-libs,ALL"]
        # Whether the CUDA half is in is no file's date: always compile.
        self.force = True
        super().build_extension(ext)


setup(
    packages=[*find_packages(include=["bpo_fast", "bpo_fast.*"]), "bpo_fast.kernels", "bpo_fast.recipes"],
    # The top-level folders kernels/ and recipes/ have no __init__.py: with one, kernels/ would hide the public package
    # of that name from whoever runs Python in this folder. bpo_fast/kernels and bpo_fast/recipes are links to them,
    # which editable installs need.
    package_dir={"bpo_fast.kernels": "kernels", "bpo_fast.recipes": "recipes"},
    ext_modules=[
        Pybind11Extension(
            "bpo_fast._C",
            ["csrc/bindings.cpp", "csrc/noise_cpu.cpp"],
            depends=["csrc/noise.h", "csrc/philox_normal.h"],
            cxx_std=17,
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
