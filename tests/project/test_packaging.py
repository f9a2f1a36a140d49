"""The version, and what the build refuses."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

import randlora_ext
from randlora_ext import _C

ROOT = Path(__file__).resolve().parents[2]


def test_version():
    version = (ROOT / "VERSION").read_text().strip()
    assert randlora_ext.__version__ == version == _C.build_info()["version"]


def test_a_build_under_a_newer_torch_runs_under_2_11():
    """With build isolation pip compiles under the newest torch, whatever the user has."""
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    newer, called = set(), re.compile(r"\b((?:aoti_)?torch_\w+)\(")
    for header in (*include.glob("stable/**/*.h"), *include.glob("inductor/aoti_torch/**/*.h")):
        since = r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_(\d+)_\d+(.*?)#endif"
        for minor, declarations in re.findall(since, header.read_text(), re.DOTALL):
            if int(minor) > 11:
                newer.update(called.findall(declarations))
    if not newer:
        pytest.skip("this torch has nothing that 2.11 lacks")
    needed = subprocess.check_output(["nm", "-D", "--undefined-only", _C.__file__], text=True)
    needed = {name for name in needed.split() if re.match("(aoti_)?torch_", name)}
    assert needed and not needed & newer


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A folder with setup.py and empty sources, and a torch that has CUDA 12.8, but no nvcc."""
    for name in ("setup.py", "VERSION"):
        shutil.copy(ROOT / name, tmp_path)
    sources = [f"cpu/isa_{isa}.cpp" for isa in ("portable", "avx2", "avx512")]
    sources += ["cpu/dispatch.cpp", "cpu/packing.cpp", "python/module.cpp", "cuda/one.cu"]
    for source in sources:
        path = tmp_path / "csrc" / source
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "randlora_ext").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANDLORA_CUDA", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    return tmp_path


def build(monkeypatch):
    """Runs setup.py's build_ext in the current folder."""

    def setup(**given):
        setuptools.Distribution({**given, "script_args": []}).run_command("build_ext")

    monkeypatch.setattr(setuptools, "setup", setup)
    runpy.run_path("setup.py")


def install_nvcc(folder: Path, version: str, monkeypatch) -> None:
    """An nvcc that knows its version and compiles nothing."""
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f"[ $1 = --version ] && echo 'Cuda compilation tools, release {version}, V{version}.1'\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(folder / "cuda"))


@pytest.mark.parametrize(
    "settings, nvcc, says",
    [
        (
            {"RANDLORA_CUDA": "1"},
            None,
            "RANDLORA_CUDA=1, but nvcc was not found; install CUDA 12.8",
        ),
        ({"RANDLORA_CUDA": "1"}, "13.0", "RANDLORA_CUDA=1, but nvcc 13.0 is of another major"),
        ({"RANDLORA_CUDA": "yes"}, "12.8", "must be 0, 1 or unset"),
        ({"RANDLORA_CUDA": "0"}, None, "error: there is no C\\+\\+ compiler 'no-such-compiler'"),
    ],
)
def test_the_build_refuses_at_once_what_it_cannot_build(settings, nvcc, says, bare, monkeypatch):
    """At once: without a compiler, anything later would be the last of these errors."""
    for name, value in {**settings, "CXX": "no-such-compiler"}.items():
        monkeypatch.setenv(name, value)
    if nvcc:
        install_nvcc(bare, nvcc, monkeypatch)
    with pytest.raises(SystemExit, match=says):
        build(monkeypatch)


@pytest.mark.parametrize(
    "nvcc, present, says",
    [
        ("13.0", False, "; no CUDA kernels: nvcc 13.0 is of another major version than torch's"),
        ("13.0", True, "; CUDA kernels as found in "),
        ("12.8", False, "; no CUDA kernels: building them failed: RuntimeError: "),
        ("12.8", True, "; CUDA kernels as found in "),
    ],
)
def test_no_nvcc_costs_the_cpu_kernels(nvcc, present, says, bare, monkeypatch, capfd):
    """Neither one that torch refuses nor one that fails. A library of CMake's is packaged."""
    install_nvcc(bare, nvcc, monkeypatch)
    library = "randlora_ext/librandlora_cuda.so"
    if present:
        (bare / library).write_text("CMake's")
    build(monkeypatch)
    assert says in capfd.readouterr().out.splitlines()[-1]
    assert list(bare.glob("build/lib*/randlora_ext/_C*.so"))
    packaged = [path.read_text() for path in bare.glob(f"build/lib*/{library}")]
    assert packaged == ["CMake's"] * present


def test_an_nvcc_that_fails_stops_a_build_that_requires_it(bare, monkeypatch):
    install_nvcc(bare, "12.8", monkeypatch)
    monkeypatch.setenv("RANDLORA_CUDA", "1")
    with pytest.raises(SystemExit, match="RANDLORA_CUDA=1, but building them failed"):
        build(monkeypatch)


@pytest.fixture
def decide(bare, monkeypatch):
    """The functions of setup.py."""
    monkeypatch.setattr(setuptools, "setup", lambda **given: None)
    return SimpleNamespace(**runpy.run_path("setup.py"))


@pytest.mark.parametrize(
    "asked, cards, nvcc, kept, old",
    [
        ("", [], (13, 0), "8.0 8.6 8.9 9.0 10.0 12.0+PTX", ""),
        ("", [], (12, 6), "8.0 8.6 8.9 9.0+PTX", ""),
        ("", [(9, 0), (9, 0)], (13, 0), "9.0+PTX", ""),
        ("", [(8, 0), (7, 5)], (13, 0), "8.0+PTX", "7.5"),
        ("native", [(7, 5)], (13, 0), "", "7.5+PTX"),
        ("9.0a", [(7, 5)], (13, 0), "9.0a", ""),
        ("7.0;7.5 10.0;12.0+PTX", [], (13, 0), "10.0 12.0+PTX", "7.0 7.5"),
    ],
)
def test_for_which_cards_the_library_is_built(asked, cards, nvcc, kept, old, decide):
    assert decide.architectures(asked, cards, nvcc) == (kept.split(), old.split())


@pytest.mark.parametrize(
    "wanted, torch_cuda, nvcc, kept, present, builds, says",
    [
        ("", "13.0", (13, 1), ["8.0"], True, True, "by nvcc 13.1 for 8.0; left out, as older"),
        ("1", "12.8", (12, 6), ["8.0"], False, True, "by nvcc 12.6 for 8.0"),
        ("", None, (13, 0), ["8.0"], False, False, "this torch has no CUDA; build under one"),
        ("1", None, None, ["8.0"], True, False, "CUDA kernels as found in"),
        ("", "12.8", None, ["8.0"], False, False, "nvcc was not found; install CUDA 12.8's"),
        ("", "13.0", (12, 8), ["8.0"], False, False, "cmake --install"),
        ("", "13.0", (13, 0), [], False, False, "the only cards, 7.5, are older than 8.0"),
        ("0", "13.0", (13, 0), ["8.0"], True, False, "because RANDLORA_CUDA=0"),
    ],
)
def test_what_an_installation_does_about_the_cuda_library(
    wanted, torch_cuda, nvcc, kept, present, builds, says, decide
):
    build, told = decide.cuda_plan(wanted, torch_cuda, nvcc, (kept, ["7.5"]), present)
    assert build == builds and says in told


def test_tools_are_pinned():
    """clang-format or ruff of another version would format files that nobody has changed."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    tools = re.findall(r"additional_dependencies: \[(.*)\]", config)
    assert len(tools) == config.count("language: python")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for tool in (*tools, *project["optional-dependencies"]["lint"]):
        assert re.fullmatch(r"[\w-]+==[\d.]+", tool), tool


@pytest.mark.parametrize("wanted, found", [("3", 3), ("0", 8), ("", 8), ("two", 8)])
def test_max_jobs_means_what_ninja_takes_it_for(wanted, found, decide, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", wanted)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert decide.max_jobs() == found


def test_the_compiler_is_the_first_that_is_there(decide, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler .*install g\+\+ or clang\+\+"):
        decide.compiler()
    (tmp_path / "clang++").symlink_to("/bin/true")
    assert decide.compiler() == "clang++"
    monkeypatch.setenv("CXX", "ccache g++")
    with pytest.raises(SystemExit, match="CXX must be one program, without arguments, got 'ccache"):
        decide.compiler()
