"""The documentation is run: its Python blocks, and the operators' schemas against torch's own."""

import re
from pathlib import Path

import pytest
import torch

import randlora_ext

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/math.md", "docs/ops.md", "docs/formats.md", "docs/peft.md")
BLOCK = re.compile(r"^(<!-- no-test -->\n+)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """(line of its first statement, source) of each Python block that is not marked no-test."""
    return [
        (text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in BLOCK.finditer(text)
        if match[1] is None
    ]


@pytest.fixture
def torch_settings():
    """Pages may set threads, seed and default dtype; the next test gets them back."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    state = torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_rng_state(state)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch, torch_settings):
    path = ROOT / page
    if not path.exists():
        pytest.fail(f"{page} does not exist")
    found = blocks(path.read_text())
    if page != "README.md":
        assert found, f"{page} has no Python block"
    monkeypatch.chdir(tmp_path)  # a page may write files
    monkeypatch.delenv("RANDLORA_PATH", raising=False)
    namespace: dict = {"__name__": "docs"}
    for line, source in found:
        # Padded with empty lines, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + source, str(path), "exec"), namespace)


def test_blocks_marked_no_test_are_left_out():
    text = "a\n<!-- no-test -->\n```python\nx\n```\n\n```python\ny = 1\nz\n```\n```bash\nq\n```\n"
    assert blocks(text) == [(8, "y = 1\nz\n")]


def registered() -> dict[str, str]:
    """Schema by name of every operator in the namespace."""
    assert randlora_ext.__version__  # importing it registers them
    schemas = torch._C._jit_get_all_schemas()
    return {s.name.split("::")[1]: str(s) for s in schemas if s.name.startswith("randlora::")}


def documented() -> dict[str, str]:
    """Text of docs/ops.md by operator."""
    return dict(SECTION.findall((ROOT / "docs/ops.md").read_text()))


def test_every_operator_is_documented_and_no_other():
    assert sorted(documented()) == sorted(registered())


@pytest.mark.parametrize("name", sorted(registered()))
def test_operator_section(name):
    text = documented()[name]
    lines = text.splitlines()
    schemas = [line for line in lines if line.startswith("randlora::")]
    assert schemas == [registered()[name]]
    for part in ("**Equivalent.**", "**Errors.**", "```python\n"):
        assert part in text, f"the section of {name} has no {part!r}"


def test_relative_links_lead_somewhere():
    pages = [ROOT / page for page in (*PAGES, "docs/basis-spec.md", "CONTRIBUTING.md")]
    for path in (p for p in pages if p.exists()):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"
