"""The build of the CUDA library, with a script in place of nvcc: for which cards, what is compiled
again, and what happens where nvcc is missing or fails."""

import importlib.util
import os
import stat
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKE = """#!/bin/sh
echo "$@" >> "{log}"
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;;
  --list-gpu-code) echo sm_75 sm_80 sm_86 sm_90; exit;;
  --list-gpu-arch) echo compute_75 compute_80 compute_86 compute_90; exit;;
esac
for last; do :; done
{body}
"""


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """csrc/cuda/nvcc.py with its own build folder and an environment without any nvcc."""
    spec = importlib.util.spec_from_file_location("nvcc_build", ROOT / "csrc/cuda/nvcc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BUILD_DIR", tmp_path / "build")
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "RANDLORA_CUDA", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    which = module.shutil.which
    monkeypatch.setattr(
        module.shutil, "which", lambda c: which(c) if str(tmp_path) in c or c == "sh" else None
    )
    return module


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a script that acts as nvcc into CUDA_HOME; returns what it was called with."""

    def install(body='echo made > "$last"'):
        (tmp_path / "bin").mkdir(exist_ok=True)
        script = tmp_path / "bin" / "nvcc"
        script.write_text(FAKE.format(log=tmp_path / "log", body=body))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        return str(script)

    def calls():
        lines = (tmp_path / "log").read_text().splitlines()
        (tmp_path / "log").write_text("")
        return [line for line in lines if " -o " in line]

    install.calls = calls
    return install


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("8.0 8.6, 9.0", ["sm_80", "sm_86", "sm_90"]),
        ("9.0a", ["sm_90a"]),
        ("12.0+PTX", ["sm_120", "compute_120"]),
        ("7.0 7.5 8.0", ["sm_80"]),
        ("9.0;9.0+PTX", ["sm_90", "compute_90"]),
        ("Hopper", ["sm_90", "compute_90"]),
        ("Ampere;Ada", ["sm_80", "sm_86", "compute_86", "sm_89", "compute_89"]),
    ],
)
def test_arch_list(nvcc, text, archs):
    assert nvcc.parse_arch_list(text) == archs


@pytest.mark.parametrize("text", ["90", "sm_90", "8.0;;x", "Volta", "7.5", "8.0+ptx"])
def test_arch_list_refused(nvcc, text):
    with pytest.raises(nvcc.BuildError, match="TORCH_CUDA_ARCH_LIST"):
        nvcc.parse_arch_list(text)


def test_default_is_what_nvcc_knows(nvcc, fake):
    script = fake()
    assert nvcc.architectures(script) == ["sm_80", "sm_86", "sm_90", "compute_80"]
    assert nvcc.architectures(script, nvcc.FEW) == ["sm_80", "compute_80"]
    with pytest.raises(nvcc.BuildError, match="none of sm_100"):
        nvcc.architectures(script, ["sm_100"])


def test_first_half_is_shared(nvcc):
    assert nvcc.gencode("sm_86") == "-gencode=arch=compute_80,code=sm_86"
    assert nvcc.gencode("sm_90") == "-gencode=arch=compute_80,code=sm_90"
    assert nvcc.gencode("sm_121") == "-gencode=arch=compute_100,code=sm_121"
    assert nvcc.gencode("sm_90a") == "-gencode=arch=compute_90a,code=sm_90a"
    assert nvcc.gencode("compute_120") == "-gencode=arch=compute_120,code=compute_120"


def test_arch_list_beyond_nvcc(nvcc, fake, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;12.0")
    with pytest.raises(nvcc.BuildError, match="13.0.88 does not compile for sm_120"):
        nvcc.architectures(fake())


def test_only_what_changed_is_compiled_again(nvcc, fake, tmp_path, monkeypatch):
    script = fake()
    sources = sorted(
        p.name for p in (ROOT / "csrc/cuda").glob("*.c*") if p.suffix in (".cu", ".cpp")
    )
    assert "table.cpp" in sources and "fill_planes.cu" in sources
    output = tmp_path / "lib.so"
    nvcc.build(script, output, ["sm_90"])
    assert output.exists()
    assert len(fake.calls()) == len(sources) + 1  # and the link
    nvcc.build(script, output, ["sm_90"])
    assert fake.calls() == []
    os.utime(tmp_path / "fill_planes.cu.o", (0, 0))  # older than its source
    nvcc.build(script, output, ["sm_90"])
    again = fake.calls()
    assert len(again) == 2 and "fill_planes.cu" in again[0] and "-shared" in again[1]
    nvcc.build(script, output, ["sm_80", "sm_90"])
    assert sum("code=sm_80" in call for call in fake.calls()) == sum(".cu" in s for s in sources)


def test_a_failed_link_is_not_taken_for_done(nvcc, fake, tmp_path):
    script = fake(
        'case "$*" in *-shared*) echo undefined reference >&2; exit 1;; esac; echo > "$last"'
    )
    for _ in range(2):
        with pytest.raises(nvcc.BuildError, match="undefined reference"):
            nvcc.build(script, tmp_path / "lib.so", ["sm_90"])
    assert not (tmp_path / "lib.so").exists()


def test_interface_depends_on_the_headers(nvcc):
    assert nvcc.interface() == nvcc.interface()
    assert nvcc.interface().startswith("-DRANDLORA_CUDA_INTERFACE=0x")


@pytest.mark.parametrize("torch_has_cuda", [False, True])
def test_without_nvcc(nvcc, monkeypatch, torch_has_cuda):
    library, about = nvcc.build_as_asked(torch_has_cuda)
    assert library is None and "nvcc was not found" in about
    monkeypatch.setenv("RANDLORA_CUDA", "1")
    with pytest.raises(nvcc.BuildError, match="RANDLORA_CUDA=1, but nvcc was not found"):
        nvcc.build_as_asked(torch_has_cuda)


def test_forced_off_and_nonsense(nvcc, fake, monkeypatch):
    fake()
    monkeypatch.setenv("RANDLORA_CUDA", "0")
    library, about = nvcc.build_as_asked(True)
    assert library is None and "RANDLORA_CUDA=0" in about
    monkeypatch.setenv("RANDLORA_CUDA", "yes")
    with pytest.raises(nvcc.BuildError, match="0, 1 or unset"):
        nvcc.build_as_asked(True)


def test_with_nvcc(nvcc, fake):
    fake()
    library, about = nvcc.build_as_asked(True)
    assert library.exists() and about.endswith("sm_80 sm_86 sm_90 compute_80")
    library, about = nvcc.build_as_asked(False)
    assert library.exists() and about.endswith("13.0.88: sm_80 compute_80")


def test_failing_nvcc(nvcc, fake, monkeypatch):
    fake("echo unsupported compiler >&2; exit 1")
    library, about = nvcc.build_as_asked(False)  # a CPU user never notices
    assert library is None and "unsupported compiler" in about
    with pytest.raises(nvcc.BuildError, match="unsupported compiler(.|\n)*RANDLORA_CUDA=0"):
        nvcc.build_as_asked(True)
    monkeypatch.setenv("RANDLORA_CUDA", "1")
    with pytest.raises(nvcc.BuildError, match="unsupported compiler"):
        nvcc.build_as_asked(False)
