"""The public names and their signatures, against a list in the repository; _C.pyi, against _C.

python tests/project/test_public_names.py     # after a change that is meant: writes the list
"""

import ast
import inspect
import re
from pathlib import Path

import pytest

import randlora_ext
from randlora_ext import _C

ROOT = Path(__file__).parents[2]
LIST = ROOT / "tests" / "data" / "public_names.txt"
STUB = Path(randlora_ext.__file__).with_name("_C.pyi")


def signature_of(value) -> str:
    """Names, kinds and defaults of the parameters; annotations are mypy's business. Of a class
    without those that PEFT's has, which change with its versions."""
    found = inspect.signature(value)
    foreign: set[str] = set()
    for base in value.__mro__ if inspect.isclass(value) else ():
        if base.__module__.startswith("peft."):
            foreign |= inspect.signature(base).parameters.keys()
    own = [p for name, p in found.parameters.items() if name not in foreign]
    bare = [p.replace(annotation=p.empty) for p in own]
    return str(found.replace(parameters=bare, return_annotation=found.empty))


# Imported when they are asked for, since they need transformers, so not in __all__.
LATE = {"randlora_ext": ["ForgettingBudget"]}


def lines_of(module) -> list[str]:
    lines = []
    for name in sorted([*module.__all__, *LATE.get(module.__name__, [])]):
        value, path = getattr(module, name), f"{module.__name__}.{name}"
        if not callable(value):
            lines.append(path)
            continue
        lines.append(path + signature_of(value))
        if inspect.isclass(value):
            lines += [f"{path}.{line}" for line in members_of(value)]
    return lines


def members_of(cls: type) -> list[str]:
    """Public methods and properties that our own classes define."""
    found = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("randlora_ext"):
            found |= {name: member for name, member in vars(base).items() if name[0] != "_"}
    lines = []
    for name, member in sorted(found.items()):
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        lines.append(name + signature_of(member) if inspect.isroutine(member) else name)
    return lines


def test_public_names():
    peft = pytest.importorskip("randlora_ext.peft")
    wanted = LIST.read_text().splitlines()
    found = lines_of(randlora_ext) + lines_of(peft)
    how = f"if that is meant: PYTHONPATH=. python {Path(__file__).relative_to(ROOT)}"
    assert sorted(set(found) - set(wanted)) == [], f"these are new; {how}"
    assert sorted(set(wanted) - set(found)) == [], f"these are gone; {how}"


def test_the_stub_says_what_the_compiled_module_has():
    stub = ast.parse(STUB.read_text())
    said = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    has = {name for name in dir(_C) if not name.startswith("__")}
    assert said.keys() == has
    for name, node in said.items():
        head = getattr(_C, name).__doc__.splitlines()[0]  # "name(a: T, b: T = default) -> T"
        inside = re.fullmatch(rf"{name}\((.*)\) -> .*", head)[1]
        compiled = ast.parse(f"def f({inside}): ...").body[0].args
        assert [a.arg for a in (*node.args.posonlyargs, *node.args.args)] == [
            a.arg for a in compiled.args
        ], name
        assert list(map(ast.unparse, node.args.defaults)) == list(
            map(ast.unparse, compiled.defaults)
        ), name
    (info,) = (node for node in stub.body if isinstance(node, ast.ClassDef))
    assert [field.target.id for field in info.body] == list(_C.build_info())


if __name__ == "__main__":
    import randlora_ext.peft

    LIST.write_text("\n".join(lines_of(randlora_ext) + lines_of(randlora_ext.peft)) + "\n")
