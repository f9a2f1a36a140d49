"""The version, what the build refuses, and the stub of the compiled module."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import randlora_ext
from randlora_ext import _C

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(randlora_ext.__file__).parent


def test_version():
    version = (ROOT / "VERSION").read_text().strip()
    assert randlora_ext.__version__ == version
    assert _C.build_info()["version"] == version


NO_COMPILER = "there is no C++ compiler 'no-such-compiler'"
REFUSED = [
    ("--version", {"RANDLORA_CUDA": "1"}, "RANDLORA_CUDA=1, but this torch has no CUDA"),
    ("--version", {"RANDLORA_CUDA": "yes"}, "must be 0, 1 or unset"),
    # At once, whatever an earlier build has left.
    ("build_ext", {"CXX": "no-such-compiler", "RANDLORA_CUDA": "0"}, f"error: {NO_COMPILER}"),
]


@pytest.mark.parametrize("command, settings, says", REFUSED)
def test_the_build_refuses_what_it_cannot_build(command, settings, says, tmp_path):
    if settings["RANDLORA_CUDA"] == "1" and torch.version.cuda:
        pytest.skip("this torch has CUDA")
    for name in ("setup.py", "VERSION"):  # away from a library that this checkout may have
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "build" / "temp").mkdir(parents=True)
    done = subprocess.run([sys.executable, "setup.py", command], cwd=tmp_path,
                          env=os.environ | settings, capture_output=True, text=True)  # fmt: skip
    assert done.returncode and says in done.stderr.splitlines()[-1]


def test_a_cuda_library_of_other_headers_is_refused(tmp_path):
    (tmp_path / "old.c").write_text(
        "static unsigned long long table[64];  /* begins with the hash of the headers: 0 */\n"
        "void *randlora_cuda_kernels(void) { return table; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "old.c", "-o", "old.so"], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-c", "import randlora_ext; print(randlora_ext.build_info()['cuda'])"],
        env={**os.environ, "RANDLORA_CUDA_LIBRARY": str(tmp_path / "old.so")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.match("not loaded: .*old.so was built from other sources", done.stdout)


def test_the_stub_declares_the_compiled_functions():
    """mypy.stubtest cannot: pybind11 gives signatures in docstrings only."""
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    declared = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert set(declared) == {name for name in dir(_C) if not name.startswith("__")}
    for name, node in declared.items():
        # pybind11's first line: name(arg0: ..., path: str, flag: bool = False) -> ...
        signature = inspect.getdoc(getattr(_C, name)).splitlines()[0]
        assert signature.startswith(f"{name}(")
        theirs = re.findall(r"(\w+): ", signature)
        ours = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        assert theirs == ours, signature
        assert signature.count(" = ") == len(node.args.defaults), signature
        annotated = {a.arg: ast.unparse(a.annotation) for a in node.args.args}
        for argument, annotation in annotated.items():
            assert f"{argument}: {annotation}" in signature, signature
    keys = next(node for node in stub.body if isinstance(node, ast.ClassDef)).body
    assert {node.target.id for node in keys} == set(_C.build_info())
