"""Model cards: which package opens the file. Their snippets are run."""

import re

import pytest
import torch
from cli_helpers import llama, with_adapter
from huggingface_hub import ModelCard
from peft_helpers import accelerated

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The present folder is a new one."""
    monkeypatch.chdir(tmp_path)
    return llama()


def adapted(base):
    return with_adapter(base, r=4, basis="independent")


def run_snippet(folder):
    """(card, its snippet, the model that this makes)"""
    card = ModelCard.load(folder / "README.md")
    (source,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    namespace = {"base": llama(), "folder": folder}
    exec(source, namespace)
    return card, source, namespace["model"].eval()


def same(model, other):
    tokens = torch.arange(6)[None]
    assert torch.equal(model(tokens).logits, other(tokens).logits)


def test_the_snippet_opens_what_was_saved(base, tmp_path):
    model = adapted(base)
    model.save_pretrained("adapter")
    accelerated.disable()
    card, _, loaded = run_snippet(tmp_path / "adapter")
    same(loaded, model)
    assert card.data.library_name == "peft"  # PEFT's own part
    assert "Only `randlora-ext`" in card.text


def test_what_stock_peft_opens_has_its_card(base, tmp_path):
    model = adapted(base)
    model.save_pretrained("adapter")
    accelerated.export_to_peft(model, "adapter")  # over the card that names us
    with_adapter(llama(), r=4, sparse=True).save_pretrained("stock")
    for folder in ("adapter", "stock"):
        text = (tmp_path / folder / "README.md").read_text()
        assert "randlora_ext" not in text
        assert "# Model Card for Model ID" in text and "opens with" not in text


def test_what_others_wrote_stays(base, tmp_path):
    model = adapted(base)
    model.save_pretrained("adapter")
    file = tmp_path / "adapter" / "README.md"
    first = file.read_text()
    file.write_text(first.replace("# Model Card for Model ID", "# Mine"))
    model.save_pretrained("adapter")
    assert file.read_text() == first.replace("# Model Card for Model ID", "# Mine")
    file.write_text("---\nlicense: mit\n---\n# Mine alone\n")
    model.save_pretrained("adapter")
    card, _, loaded = run_snippet(tmp_path / "adapter")
    assert card.data.license == "mit" and "\n# Mine alone\n" in card.text
    same(loaded, model)


def test_other_processes_write_no_card(base, tmp_path):
    (tmp_path / "adapter").mkdir()
    model = adapted(base)
    model.save_pretrained("adapter", is_main_process=False)
    model.save_pretrained("adapter", True, None, "auto", False)
    assert not (tmp_path / "adapter" / "README.md").exists()
