"""What an install gives, from any working directory; what the wheel and the sdist hold."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bpo_fast.kernels.architectures import ARCHITECTURES
from bpo_fast.ops.noise import native

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")


def python(code, *, cwd, path=()):
    """Standard output of a fresh interpreter, `path` being in front of its own packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def public_kernels(tmp_path):
    """A folder with a package named `kernels`, as `pip install kernels` would put into site-packages."""
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("__version__ = '9.9'\n")
    return tmp_path / "site"


@pytest.mark.parametrize("folder", [".", "bpo_fast", "tests", "kernels"])
def test_the_public_package_kernels_is_not_shadowed(public_kernels, folder):
    code = "import bpo_fast.kernels, kernels; print(kernels.__version__)"
    assert python(code, cwd=ROOT / folder, path=[public_kernels]) == "9.9"
    # Also where the repository root itself stands in front of the public package.
    assert python(code, cwd=ROOT / folder, path=[ROOT, public_kernels]) == "9.9"


def test_transformers_sees_no_kernels_package_in_this_repository():
    if find_spec("kernels") is not None and find_spec("kernels").origin:
        pytest.skip("the public package kernels is installed here, so there is nothing to mistake for it")
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert python(code, cwd=ROOT) == "False"


@pytest.mark.parametrize("elsewhere", [False, True])
def test_kernels_and_recipes_are_the_top_level_folders(tmp_path, elsewhere):
    code = (
        "from importlib.resources import files; "
        "print(*sorted(p.name for n in ('kernels', 'recipes') for p in files('bpo_fast.' + n).iterdir()))"
    )
    found = python(code, cwd=tmp_path if elsewhere else ROOT).split()
    for pattern in ("kernels/*.py", "recipes/*.yaml"):
        assert {path.name for path in ROOT.glob(pattern)} <= set(found)
    assert not list(ROOT.glob("kernels/__init__.py"))
    assert not list(ROOT.glob("recipes/__init__.py"))


def test_the_extension_pulls_in_neither_torch_nor_a_shared_cuda(tmp_path):
    code = (
        "import sys, bpo_fast._C; assert 'torch' not in sys.modules; "
        "print(*{line.split('/')[-1].strip() for line in open('/proc/self/maps') if '.so' in line})"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc/self/maps (Linux) to see what was loaded")
    libraries = python(code, cwd=tmp_path)
    assert "_C." in libraries
    assert not re.search(r"torch|c10|cudart|libcuda", libraries)


def test_the_extension_holds_every_architecture():
    if not native.extension().cuda_built:
        pytest.skip("needs bpo_fast._C built with nvcc (BPO_FAST_CUDA=on)")
    triton = find_spec("triton")
    cuobjdump = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not (cuobjdump and cuobjdump.exists()):
        pytest.skip("needs cuobjdump, which comes with triton")
    command = [str(cuobjdump), "--list-elf", "--list-ptx", native.extension().__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    archs, last = {f"sm_{arch}" for arch in ARCHITECTURES}, max(ARCHITECTURES)
    assert set(re.findall(r"\.(sm_\d+)\.cubin", listing)) == archs
    assert re.findall(r"\.(sm_\d+)\.ptx", listing) == [f"sm_{last}"]
    assert set(native.extension().cuda_archs) == archs | {f"compute_{last}"}


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_every_dependency_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {normalised(name): pin for name, pin in pins().items()}
    assert pinned["torch"] == "2.13.0"
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pinned[normalised(requirement.name)]), line


def build(hook, source, output, **environment):
    """Run one hook of the build backend in `source`, as pip does, in this environment; the file it made."""
    code = f"import sys; sys.path.insert(0, 'csrc'); import build_backend; build_backend.{hook}({str(output)!r})"
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (made,) = output.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel without the CUDA half, built from an sdist that was built from a copy of the sources."""
    if find_spec("pybind11") is None or find_spec("setuptools") is None:
        pytest.skip("needs pybind11 and setuptools: pip install pybind11 setuptools")
    folder = tmp_path_factory.mktemp("packaging")
    for name in ("sdist", "wheel"):
        (folder / name).mkdir()
    shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=NOT_SOURCE)
    shutil.rmtree(folder / "copy" / "runs", ignore_errors=True)
    sdist = build("build_sdist", folder / "copy", folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return build("build_wheel", source, folder / "wheel", BPO_FAST_CUDA="off")


def test_a_wheel_from_the_sdist_is_complete(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = [path for path in ROOT.glob("bpo_fast/**/*.py") if "__pycache__" not in path.parts]
    folders = ("bpo_fast/demo/checkpoint", "bpo_fast/demo/templates", "bpo_fast/bootstrap/templates")
    folders += ("bpo_fast/report/browse/page",)
    data = [path for folder in folders for path in (ROOT / folder).iterdir() if path.is_file()]
    expected = {str(path.relative_to(ROOT)) for path in [*sources, *data]}
    for pattern in ("kernels/*.py", "recipes/*.yaml"):
        expected |= {f"bpo_fast/{path.relative_to(ROOT)}" for path in ROOT.glob(pattern)}
    assert expected <= names
    assert [name for name in names if re.fullmatch(r"bpo_fast/_C\..*so", name)]
    assert not [name for name in names if not name.startswith(("bpo_fast/", f"bpo_fast-{version('bpo-fast')}"))]


WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
from bpo_fast.cli.main import main
from bpo_fast.demo import pipeline

small = {"num_annotations": 40, "num_heldout": 6, "num_probe_pairs": 2, "train_steps": 2, "num_noise_scenes": 2}
pipeline.run("bpo_output/demo", settings=pipeline.DemoSettings(**small, batch_size=2))
sys.exit(main(["bootstrap", "--config", "tiny", "--max_samples", "4", "--max_new_tokens", "3",
    "--annotations", "bpo_output/demo/seed-0/annotated/instruct.json",
    "--image_folder", "bpo_output/demo/seed-0/annotated/images"]))
"""


def test_the_demo_and_its_recipe_run_from_a_wheel_in_any_folder_without_matplotlib(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    said = python(WITHOUT_MATPLOTLIB, cwd=tmp_path / "empty", path=[tmp_path / "site"])
    assert re.search(r"^\d pairs in bpo_output/bootstrap ", said.splitlines()[-1])
    assert (tmp_path / "empty/bpo_output/demo/report.html").is_file()


def test_a_wheel_without_cuda_works_and_says_what_is_missing(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import bpo_fast.kernels\nfrom bpo_fast.ops.noise import native\n"
        "print(bpo_fast.kernels.__path__[0])\nprint(native.extension().cuda_archs)\n"
        "try:\n    native.cuda_extension()\nexcept RuntimeError as error:\n    print(error)"
    )
    folder, archs, sentence = python(code, cwd=tmp_path, path=[tmp_path / "site"]).splitlines()
    assert folder == str(tmp_path / "site" / "bpo_fast" / "kernels")
    assert archs == "()"
    assert sentence.startswith(
        "bpo_fast._C: found no CUDA half, expected one for CUDA tensors; run BPO_FAST_CUDA=on pip"
    )
