"""Model cards: which package opens the file. Their snippets are run."""

import re
from types import SimpleNamespace

import pytest
import torch
from cli_helpers import llama, with_adapter
from cli_helpers import run as cli
from huggingface_hub import ModelCard
from peft_helpers import accelerated, randomize
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
    assert card.data.library_name == "peft" and card.data.base_model == "base"
    assert {"base_model:adapter:base", "transformers"} <= set(card.data.tags)
    assert (card.data.pipeline_tag == "text-generation") == (task is not None)
    assert ("Only `randlora-ext` opens it" in card.text) == (kind != "stock")


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
    assert card.data.license == "mit" and card.text.strip().startswith("# Mine alone")
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


def test_what_is_exported(base, tmp_path):
    model = adapted(base)
    done = accelerated.export_to_lora(model, "lora", rank=32)
    accelerated.export_to_peft(model, "for-peft")
    model.save_pretrained("adapter")
    for to, more in (("lora", ("--rank", 32)), ("peft", ())):
        assert cli("convert", "adapter", f"to-{to}", "--to", to, *more, "--base", "base")[0] == 0
    accelerated.disable()
    card, source, loaded = run_snippet(tmp_path / "lora")
    assert "randlora_ext" not in source and "'lora'" in source
    same(loaded, model, rtol=1e-3, atol=1e-3)
    assert "lora" in card.data.tags and card.data.base_model == "base"
    assert "rank 32 that is nearest" in card.text and f"{done.energy:.4f}" in card.text
    _, source, loaded = run_snippet(tmp_path / "for-peft")
    assert "randlora_ext" not in source and "'for-peft'" in source
    same(loaded, model)
    for to, tag in (("to-lora", "lora"), ("to-peft", "transformers")):
        card, source, loaded = run_snippet(tmp_path / to)
        assert "randlora_ext" not in source and tag in card.data.tags
        assert type(loaded.base_model.model) is LlamaForCausalLM


def test_push_to_hub_uploads_the_card(base, tmp_path, monkeypatch):
    """transformers puts the repository's card, or an empty one, over PEFT's before it uploads."""
    from transformers.utils import hub

    uploaded = {}

    def commit(repo_id, operations, **_):
        files = {each.path_in_repo: each.path_or_fileobj for each in operations}
        uploaded["card"] = open(files["README.md"]).read()

    fakes = {
        "create_repo": lambda repo_id, **_: SimpleNamespace(repo_id=f"me/{repo_id}"),
        "create_commit": commit,
        "create_branch": lambda *_, **__: None,
    }
    card = ModelCard("---\nlicense: mit\n---\n# On the hub\n")
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(hub, "hf_api", lambda: SimpleNamespace(**fakes), raising=False)
    for name, fake in fakes.items():  # of older transformers
        monkeypatch.setattr(hub, name, fake, raising=False)
    adapted(base).push_to_hub("mine")
    card = ModelCard(uploaded["card"])
    assert card.data.license == "mit" and card.data.base_model == "base"
    assert "# On the hub" in card.text and "from_pretrained(base, 'me/mine')" in card.text
    assert "Only `randlora-ext` opens it" in card.text
