"""Model cards: which package opens the file. Their snippets are run."""

import re

import pytest
import torch
from cli_helpers import llama, with_adapter
from huggingface_hub import ModelCard
from peft_helpers import accelerated, made, randomize
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {
    "stock": {"sparse": True},
    "seed": {"basis": "independent"},
    "density": {"density": 0.2, "save_projection": False},
}


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A model saved in the folder "base" of the present folder."""
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("base")
    return LlamaForCausalLM.from_pretrained("base")


def adapted(base, task="CAUSAL_LM", kind="seed"):
    return with_adapter(base, r=4, task_type=task, **KINDS[kind])


def run_snippet(folder):
    """(card, its snippet, the model that this makes)"""
    card = ModelCard.load(folder / "README.md")
    (source,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    namespace = {}
    exec(source, namespace)
    return card, source, namespace["model"].eval()


def same(model, other, **limits):
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(model(tokens).logits, other(tokens).logits, **limits)


@pytest.mark.parametrize(
    "kind,task", [("stock", "CAUSAL_LM"), ("seed", None), ("density", "CAUSAL_LM")]
)
def test_the_snippet_opens_what_was_saved(base, tmp_path, kind, task):
    model = adapted(base, task, kind)
    model.save_pretrained("adapter")
    accelerated.disable()
    card, source, loaded = run_snippet(tmp_path / "adapter")
    assert ("randlora_ext.peft.enable()" in source) == (kind != "stock")
    assert "LlamaForCausalLM.from_pretrained('base')" in source
    same(loaded, model)
    assert card.data.library_name == "peft" and card.data.base_model == "base"  # PEFT's own part
    assert ("Only `randlora-ext`" in card.text) == (kind != "stock")


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


def test_an_adapter_in_a_folder_of_its_name(base, tmp_path):
    model = adapted(base)
    model.add_adapter("mine", model.peft_config["default"])
    model.delete_adapter("default")
    model.set_adapter("mine")
    randomize(model).save_pretrained("adapter")
    _, source, loaded = run_snippet(tmp_path / "adapter")
    assert "subfolder='mine'" in source
    same(loaded, model)


def test_a_classifier_says_how_many_labels_it_has(base, tmp_path):
    classifier = LlamaForSequenceClassification.from_pretrained("base", num_labels=5)
    classifier.config.pad_token_id = 0
    model = adapted(classifier, "SEQ_CLS")
    model.save_pretrained("adapter")
    _, source, loaded = run_snippet(tmp_path / "adapter")
    assert "num_labels=5" in source
    loaded.config.pad_token_id = 0
    same(loaded, model)


def test_other_processes_write_no_card(base, tmp_path):
    (tmp_path / "adapter").mkdir()
    model = adapted(base)
    model.save_pretrained("adapter", is_main_process=False)
    model.save_pretrained("adapter", True, None, "auto", False)
    assert not (tmp_path / "adapter" / "README.md").exists()


def test_what_is_exported_needs_peft_alone(base, tmp_path):
    model = adapted(base)
    accelerated.export_to_peft(model, "for-peft")
    accelerated.disable()
    card, source, loaded = run_snippet(tmp_path / "for-peft")
    assert "randlora_ext" not in card.text and "'for-peft'" in source
    same(loaded, model)


def test_a_model_that_transformers_does_not_know(tmp_path):
    made(basis="hadamard").save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "base = ...  # the model that the adapter was trained on" in text
