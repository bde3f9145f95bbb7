"""Which CUDA toolkit the build takes, when pip is asked to fetch one, and what is said where there is none."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from bpo_fast.kernels.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def backend():
    spec = importlib.util.spec_from_file_location("build_backend_under_test", ROOT / "csrc" / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def bare(backend, monkeypatch):
    """The backend on a Linux machine without nvcc and without a driver."""
    monkeypatch.delenv("BPO_FAST_CUDA", raising=False)
    monkeypatch.setattr(backend.platform, "system", lambda: "Linux")
    monkeypatch.setattr(backend, "find_toolkit", lambda: None)
    monkeypatch.setattr(backend, "_has_driver", lambda: False)
    return backend


def fake_nvcc(folder, release):
    """A compiler that only answers what find_toolkit asks."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.1";;\n'
        f'*) echo "#\\$ TOP={folder}/bin/.." >&2;; esac\n'
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize(
    ("mode", "driver", "fetched"),
    [("auto", False, False), ("auto", True, True), ("on", False, True), ("off", True, False)],
)
def test_when_nvcc_is_fetched(bare, monkeypatch, mode, driver, fetched):
    monkeypatch.setenv("BPO_FAST_CUDA", mode)
    monkeypatch.setattr(bare, "_has_driver", lambda: driver)
    for hook in (bare.get_requires_for_build_wheel, bare.get_requires_for_build_editable):
        assert [line for line in hook() if "nvcc" in line] == (["nvidia-cuda-nvcc==13.0.88"] if fetched else [])
        assert not any("torch" in line for line in hook())


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_nothing_is_fetched_where_nvcc_is_there(bare, monkeypatch, mode):
    monkeypatch.setenv("BPO_FAST_CUDA", mode)
    monkeypatch.setattr(bare, "_has_driver", lambda: True)
    monkeypatch.setattr(bare, "find_toolkit", lambda: bare.Toolkit("nvcc", Path("cuda")))
    assert bare.get_requires_for_build_wheel() == []
    assert bare.toolkit_for_build().nvcc == "nvcc"


def test_off_ignores_a_toolkit(bare, monkeypatch):
    monkeypatch.setenv("BPO_FAST_CUDA", "off")
    monkeypatch.setattr(bare, "find_toolkit", lambda: bare.Toolkit("nvcc", Path("cuda")))
    assert bare.toolkit_for_build() is None


def test_auto_builds_the_cpu_half_alone(bare):
    assert bare.toolkit_for_build() is None


def test_on_without_nvcc_is_refused(bare, monkeypatch):
    monkeypatch.setenv("BPO_FAST_CUDA", "on")
    with pytest.raises(
        SystemExit, match=f"^BPO_FAST_CUDA: found on without a compiler, expected {bare.MIN_NVCC}; install"
    ):
        bare.toolkit_for_build()


def test_on_outside_linux_is_refused(bare, monkeypatch):
    monkeypatch.setenv("BPO_FAST_CUDA", "on")
    monkeypatch.setattr(bare.platform, "system", lambda: "Darwin")
    with pytest.raises(SystemExit, match=r"^BPO_FAST_CUDA: found on, expected auto or off on Darwin\.$"):
        bare.cuda_mode()


def test_unknown_mode_is_refused(bare, monkeypatch):
    monkeypatch.setenv("BPO_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match=r"^BPO_FAST_CUDA: found 'yes', expected auto, on or off\.$"):
        bare.cuda_mode()


def test_cuda_home_comes_first_and_old_releases_are_not_used(backend, monkeypatch, tmp_path, capsys):
    old, new, on_path = tmp_path / "old", tmp_path / "new", tmp_path / "on_path"
    fake_nvcc(old, "12.4")
    fake_nvcc(new, "13.0")
    fake_nvcc(on_path, "12.9")
    monkeypatch.setenv("CUDA_HOME", str(old))
    monkeypatch.setenv("CUDA_PATH", str(new))
    monkeypatch.setenv("PATH", f"{on_path / 'bin'}:/usr/bin:/bin")
    toolkit = backend.find_toolkit()
    assert toolkit.nvcc == str(new / "bin" / "nvcc")
    assert toolkit.root == new
    assert f"{old}/bin/nvcc: found release 12.4, expected {backend.MIN_NVCC}; it is not" in capsys.readouterr().err
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH")
    assert backend.find_toolkit().root == on_path


def test_a_toolkit_without_the_static_runtime(backend, tmp_path):
    with pytest.raises(SystemExit, match=f"^libcudart_static.a: found none under {tmp_path}, expected the static"):
        _ = backend.Toolkit("nvcc", tmp_path).library_dir
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart_static.a").touch()
    assert backend.Toolkit("nvcc", tmp_path).library_dir == tmp_path / "lib"


def test_a_failing_compiler_names_the_way_out(backend, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    with pytest.raises(SystemExit, match=r"^x\.cu: found exit code 1 from .*nvcc, expected 0; set BPO_FAST_CUDA=off"):
        backend.compile_cuda(backend.Toolkit(str(nvcc), tmp_path), "x.cu", tmp_path / "x.o")


def test_every_architecture_is_asked_for(backend, monkeypatch, tmp_path):
    commands = []

    def record(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(backend.subprocess, "run", record)
    backend.compile_cuda(backend.Toolkit("nvcc", tmp_path), "x.cu", "x.o")
    (command,) = commands
    for arch in ARCHITECTURES:
        assert f"arch=compute_{arch},code=sm_{arch}" in command
    assert f"arch=compute_{max(ARCHITECTURES)},code=compute_{max(ARCHITECTURES)}" in command
    assert "--fmad=false" in command


def test_the_table_of_architectures_is_read_where_nothing_is_installed():
    table = ROOT / "kernels" / "architectures.py"
    code = f"import runpy; print(*runpy.run_path({str(table)!r})['ARCHITECTURES'])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(arch) for arch in ARCHITECTURES]
    assert list(ARCHITECTURES) == sorted(ARCHITECTURES)
