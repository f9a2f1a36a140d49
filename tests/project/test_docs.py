"""The documentation is run: its Python blocks, and the operators' schemas against torch's own."""

import copy
import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import randlora_ext

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS]
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
def toy_hub(monkeypatch):
    """What README downloads is a random Llama of one layer, over bytes."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    numbers = {token: i for i, token in enumerate(["<end>", *sorted(split.alphabet())])}
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, []))
    bytewise.pre_tokenizer = split
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(numbers), num_hidden_layers=1, **sizes)
    downloads = {
        transformers.AutoTokenizer: lambda name: fast,
        transformers.AutoModelForCausalLM: lambda name: transformers.LlamaForCausalLM(config),
    }
    for auto, download in downloads.items():
        monkeypatch.setattr(auto, "from_pretrained", download)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks((ROOT / p).read_text())])
def test_python_blocks_run(page, tmp_path, monkeypatch, stock_peft, toy_hub):
    path = ROOT / page
    found = blocks(path.read_text())
    monkeypatch.chdir(tmp_path)  # a page may write files
    namespace: dict = {"__name__": "docs"}
    for line, source in found:
        # Padded with empty lines, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + source, str(path), "exec"), namespace)


def test_lora_of_one_rank_is_the_nearest_and_opens(tmp_path):
    """The function of docs/serve.md, on a layer narrower than the rank and on a wider one."""
    peft = pytest.importorskip("peft")
    helpers = importlib.import_module("peft_helpers")
    (source,) = [s for _, s in blocks((ROOT / "docs/serve.md").read_text()) if "of_one_rank" in s]
    base = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 8))
    model = helpers.adapted(copy.deepcopy(base), "01", basis="hadamard", randlora_alpha=100)
    with pytest.raises(ValueError, match="The chosen rank 16 is larger than the weight shape"):
        peft.convert_to_lora(model, rank=16)
    source = source.replace("128", "16").replace('"ask"', '"default"')
    exec(source.replace("OUT", str(tmp_path)), {"peft": peft, "torch": torch, "model": model})
    opened = peft.PeftModel.from_pretrained(base, tmp_path)
    for own, lora in zip(helpers.layers(model), opened.base_model.model, strict=True):
        U, S, V = torch.linalg.svd(own.get_delta_weight("default"), full_matrices=False)
        nearest = (U[:, :16] * S[:16]) @ V[:16]
        assert lora.lora_A["default"].weight.shape == (16, 40)
        assert helpers.relative(lora.get_delta_weight("default"), nearest) < 1e-5


def test_every_operator_is_documented_and_no_other():
    schemas = [str(schema) for schema in torch._C._jit_get_all_schemas()]
    registered = {s[10 : s.index("(")]: s for s in schemas if s.startswith("randlora::")}
    registered = {name: s for name, s in registered.items() if not name.endswith("_plain")}
    documented = dict(SECTION.findall((ROOT / "docs/ops.md").read_text()))
    assert sorted(documented) == sorted(registered)
    for name, text in documented.items():
        shown = [line for line in text.splitlines() if line.startswith("randlora::")]
        assert shown == [registered[name]]
        for part in ("**Equivalent.**", "```python\n"):
            assert part in text, f"the section of {name} has no {part!r}"


def test_every_public_name_is_in_the_api_reference():
    peft = pytest.importorskip("randlora_ext.peft")
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    named = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    for module in (randlora_ext, peft):
        public = {f"{module.__name__}.{n}" for n in module.__all__ if not n.startswith("__")}
        assert public <= named, "each needs a line `::: NAME` in docs/api"


def test_figures_are_those_of_the_script(tmp_path, monkeypatch):
    figures = ROOT / "docs" / "figures"
    monkeypatch.setattr(sys, "argv", ["make_figures.py", str(tmp_path)])
    runpy.run_path(str(figures / "make_figures.py"), run_name="__main__")
    drawn, shown = words_of_figures(tmp_path), words_of_figures(figures)
    assert drawn and drawn == shown


def words_of_figures(folder):
    texts = re.compile(r"<text.*?</text>", re.DOTALL)
    return {path.name: texts.findall(path.read_text()) for path in folder.glob("*.svg")}


def test_readme_has_the_numbers_of_the_evidence():
    """Which test_benchmarks.py compares with the rows that were measured."""
    table = re.compile(r"^\| (SmolLM2|Gemma)[^,|]*, (\w+)[^|]*\|(.*)\|$", re.MULTILINE)
    rows = reversed(table.findall((ROOT / "docs" / "evidence.md").read_text()))
    evidence = {(model, task): cells for model, task, cells in rows}  # of the first table
    tasks = {"Roman": "roman", "days": "dates", "orders": "json"}
    readme = table.findall((ROOT / "README.md").read_text())
    assert len(readme) == 8
    for model, task, cells in readme:
        measurements = evidence[model, tasks.get(task, task)].split("|")
        for told, measured in zip(cells.split("|"), measurements, strict=True):
            if "forgot more" in measured:
                assert "forgot more" in told
                continue
            number = float(told.strip(" *"))
            rounding = 0.0051 if number > 0.1 else 0.00051
            assert number == pytest.approx(float(measured.split()[0]), abs=rounding)
            assert ("(1" in measured) == told.endswith("* ") or "**" in told


def test_pages_that_are_named_exist():
    """In comments, docstrings and messages; mkdocs looks at the links of pages."""
    endings = {".py", ".h", ".cpp", ".cu", ".cmake", ".sh", ".toml", ".txt", ".yml", ".md"}
    folders = "randlora_ext", "csrc", "tests", "tools", "benchmarks", "examples", "cmake"
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [*ROOT.glob("*.toml"), *ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*.txt")]
    named = [
        (path.relative_to(ROOT).as_posix(), page)
        for path in files
        if path.suffix in endings
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8"))
    ]
    assert len(named) > 50
    assert [each for each in named if not (ROOT / each[1]).exists()] == []


def test_readme_has_the_ratios_of_long_trainings():
    evidence = (ROOT / "docs" / "evidence.md").read_text()
    found = {}
    for task in ("spelling", "roman"):
        table = evidence.split(f"{task}, 400 steps: times as much forgotten")[1].split("\n\n")[1]
        for line in table.splitlines()[2:]:
            head, _, manual, _, _, _, answers, _ = map(str.strip, line.strip("|").split("|"))
            found[task, head] = [cell.split(" (")[0] for cell in (manual, answers)]
    rows = {"SHiRA": ", MLP, 2.5e-3", "OFT": ", MLP, 5e-4", "LoRA": ", MLP, 1.5e-3"}
    rows["full tuning"] = ", 2e-5"
    readme = (ROOT / "README.md").read_text()
    for name, setting in rows.items():
        told = re.search(rf"^\| {name} \| (.*) \|$", readme, re.MULTILINE)[1].split(" | ")
        for task, pair in (("spelling", told[:2]), ("roman", told[2:])):
            factor = ", times 0.7" if "†" in pair[0] else ""
            assert [cell.strip(" †") for cell in pair] == found[task, name + setting + factor]
