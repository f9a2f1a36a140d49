"""The version, and what the build refuses."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_library
import pytest
import setuptools
import torch

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


@pytest.mark.parametrize(
    "settings, says",
    [
        (
            {"RANDLORA_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "RANDLORA_CUDA=1, but nvcc was not found",
        ),
        ({"RANDLORA_CUDA": "yes"}, "must be 0, 1 or unset"),
        ({"CXX": "no-such-compiler"}, "error: there is no C\\+\\+ compiler 'no-such-compiler'"),
    ],
)
def test_the_build_refuses_at_once_what_it_cannot_build(settings, says, bare_build, monkeypatch):
    monkeypatch.setenv("RANDLORA_CUDA", "0")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=says):
        bare_build()


@pytest.fixture
def bare_build(tmp_path, monkeypatch):
    """Runs setup.py's build_ext away from what this checkout may have built; compiles nothing."""
    for name in ("setup.py", "VERSION", "tools/cuda/cuda_library.py", "csrc/core"):
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place)
    (tmp_path / "randlora_ext").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "tools" / "cuda")
    monkeypatch.delitem(sys.modules, "cuda_library", raising=False)

    def build(**given):
        setuptools.Distribution({**given, "script_args": []}).run_command("build_ext")

    monkeypatch.setattr(setuptools, "setup", build)
    yield lambda: runpy.run_path("setup.py")
    sys.modules.pop("cuda_library", None)


def fake_nvcc(folder: Path, version: str, compiles: str) -> str:
    """A program that answers as nvcc does, and then compiles by the shell command `compiles`."""
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--version) echo 'Cuda compilation tools, release {version}, V{version}.1';;\n"
        "--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n';;\n"
        f"*) {compiles};;\nesac\n"
    )
    nvcc.chmod(0o755)
    return str(folder / "cuda")


@pytest.mark.parametrize("torch_cuda", ["12.8", "13.0"])
@pytest.mark.parametrize("nvcc", ["12.8", "13.0"])
def test_nvcc_of_another_major_version_than_torch_builds(
    torch_cuda, nvcc, bare_build, tmp_path, monkeypatch, capfd
):
    """torch's own build would refuse it, after minutes; our library knows no torch."""
    touch = f'for last; do :; done; echo "$@" >>{tmp_path}/calls; echo made >"$last"'
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path, nvcc, touch))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0")
    monkeypatch.setenv("CXX", "no-such-compiler")  # the next thing that the build needs
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.delenv("RANDLORA_CUDA", raising=False)
    (tmp_path / "csrc" / "cuda").mkdir()
    (tmp_path / "csrc" / "cuda" / "one.cu").write_text("kernels")
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler"):
        bare_build()
    assert (tmp_path / "randlora_ext" / "librandlora_cuda.so").read_text() == "made\n"
    compiled, linked = (tmp_path / "calls").read_text().splitlines()
    assert "arch=compute_80,code=sm_80" in compiled and "sm_75" not in compiled
    assert "-shared" in linked and "-cudart=static" in linked


@pytest.mark.parametrize("wanted", ["", "1"])
def test_an_nvcc_that_fails_costs_the_cpu_kernels_nothing(
    wanted, bare_build, tmp_path, monkeypatch, capfd
):
    fails = "echo 'host_config.h(1): error: -- unsupported GNU version!' >&2; exit 1"
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path, "12.8", fails))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setenv("RANDLORA_CUDA", wanted)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    (tmp_path / "csrc" / "cuda").mkdir()
    (tmp_path / "csrc" / "cuda" / "one.cu").write_text("kernels")
    goes_on = "no C\\+\\+ compiler"  # to the CPU kernels, which miss theirs
    stops = "RANDLORA_CUDA=1, but .*nvcc failed: .*unsupported GNU version"
    with pytest.raises(SystemExit, match=stops if wanted else goes_on):
        bare_build()
    assert not (tmp_path / "randlora_ext" / "librandlora_cuda.so").exists()


NVCC_13 = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
NVCC_12_4 = [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)]


@pytest.mark.parametrize(
    "asked, cards, known, compiled, ptx, says",
    [
        (None, [], NVCC_13, "80 86 89 90 100 120", "120", "newer cards"),
        (None, [], NVCC_12_4, "80 86 89 90", "90", "newer cards"),
        (None, [(9, 0), (9, 0)], NVCC_13, "90", "90", "for sm_90"),
        (None, [(7, 5), (8, 0)], NVCC_13, "80", "80", "left out: sm_75, older than sm_80"),
        (None, [(12, 0)], NVCC_12_4, "", "90", "for no card directly and, through PTX of sm_90"),
        ("9.0a", [(7, 5)], NVCC_13, "90", "", "for sm_90"),
        ("7.5 8.0 9.0+PTX", [], NVCC_13, "80 90", "90", "left out: sm_75"),
        ("8.0;8.6;12.0+PTX", [(9, 0)], NVCC_13, "80 86 120", "120", "for sm_80, sm_86, sm_120"),
    ],
)
def test_for_which_cards_the_library_is_built(asked, cards, known, compiled, ptx, says):
    found = cuda_library.architectures(asked, cards, known)
    made = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in compiled.split()]
    made += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ptx.split()]
    assert found.flags == made and says in found.says


@pytest.mark.parametrize(
    "asked, cards, says",
    [
        (None, [(7, 5)], "this machine has only sm_75, and our kernels need sm_80"),
        ("7.0;7.5+PTX", [], "names only sm_70, sm_75"),
        ("Hopper", [], "'Hopper' must be a compute capability, such as 9.0"),
    ],
)
def test_cards_that_the_library_cannot_be_built_for(asked, cards, says):
    with pytest.raises(cuda_library.CannotBuild, match=says):
        cuda_library.architectures(asked, cards, NVCC_13)


@pytest.mark.parametrize(
    "wanted, torch_cuda, nvcc, present, builds, says",
    [
        ("", "13.0", "/cuda/bin/nvcc", True, True, "CUDA kernels by /cuda/bin/nvcc"),
        ("", None, "/cuda/bin/nvcc", False, False, "this torch has no CUDA; RANDLORA_CUDA=1"),
        ("1", None, "/cuda/bin/nvcc", False, True, "CUDA kernels by"),
        ("", "12.8", None, False, False, "nvcc was not found"),
        ("", None, None, True, False, "CUDA kernels as found in"),
        ("1", None, None, True, False, "CUDA kernels as found in"),
        ("0", "12.8", "/cuda/bin/nvcc", True, False, "because RANDLORA_CUDA=0"),
    ],
)
def test_what_an_installation_does_about_the_cuda_library(
    wanted, torch_cuda, nvcc, present, builds, says
):
    plan = cuda_library.plan(wanted, torch_cuda, nvcc, present)
    assert plan.build == builds and says in plan.says


def test_tools_are_pinned():
    """clang-format or ruff of another version would format files that nobody has changed."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    tools = re.findall(r"additional_dependencies: \[(.*)\]", config)
    assert len(tools) == config.count("language: python")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for tool in (*tools, *project["optional-dependencies"]["lint"]):
        assert re.fullmatch(r"[\w-]+==[\d.]+", tool), tool
