"""``randlora merge``: the files of a sharded model, against PEFT's own merging."""

import json
import shutil

import pytest
import torch
from cli_helpers import KINDS, Q0, added, edit, gpt2, llama, refused, run, save_adapter, sharded
from peft_helpers import accelerated, opened, shake
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.usefixtures("stock_peft"),
    pytest.mark.filterwarnings("ignore:Specified to not save", "ignore:RandLoRA layers of this"),
]


def by_peft(model, adapter, dtype=torch.float32):
    """The tensors of merge_and_unload."""
    accelerated.enable()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return opened(adapter, lambda: base).merge_and_unload(safe_merge=True).state_dict()


def merge(root, out="out", *options, model="model", adapter="adapter"):
    """Merges root/adapter into root/model, and returns what was printed."""
    code, said, err = run("merge", root / model, root / adapter, root / out, *options)
    assert code == 0, err
    return said + err


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_equals_merge_and_unload(tmp_path, sound, kind):
    # Of each dtype bases that are generated, drawn and uniform.
    low = kind in ("generated", "sparse saved", "uniform")
    dtype, model = torch.bfloat16 if low else torch.float32, sound / "model"
    if low:
        sharded(model := tmp_path / "model", dtype)
    save_adapter(llama().to(dtype), tmp_path / "adapter", **KINDS[kind])
    said = merge(tmp_path, model=model)
    assert "8 layers merged" in said and "merging model.layers.1" in said
    got, before = tensors_of(tmp_path / "out"), tensors_of(model)
    want = by_peft(model, tmp_path / "adapter", dtype)
    assert got.keys() == want.keys() == before.keys()
    for name, tensor in want.items():
        assert got[name].dtype == dtype
        # Sums in another order may fall on the other side of a rounding boundary.
        ulp = 2.0**-7 if low else 1e-6
        assert ((got[name] - tensor).abs() <= ulp * tensor.abs() + 1e-7).all(), name
        assert (got[name] == tensor).float().mean() > 0.9 or not low, name
    changed = [name for name in got if not torch.equal(got[name], before[name])]
    assert len(changed) == 8 and all("_proj" in name for name in changed)


def test_the_folder_opens_and_the_sources_stay(whole):
    (whole / "model" / "pytorch_model.bin").write_bytes(b"unmerged")
    files = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    assert "pytorch_model.bin" in merge(whole)
    assert all(p.read_bytes() == content for p, content in files.items())
    assert (whole / "out" / "tokenizer.json").exists()
    assert not (whole / "out" / "pytorch_model.bin").exists()
    assert sorted(p.name for p in whole.iterdir()) == ["adapter", "model", "out"]
    merged = AutoModelForCausalLM.from_pretrained(whole / "out").state_dict()
    for name, tensor in by_peft(whole / "model", whole / "adapter").items():
        torch.testing.assert_close(merged[name], tensor)


def test_one_file_and_an_adapter_of_the_inner_model(whole):
    """Its paths lack "model."; the reverse, a checkpoint without it, as well."""
    saved = load_file(whole / "adapter" / "adapter_model.safetensors")
    inner = {k.replace("model.model.model.", "model.model."): v for k, v in saved.items()}
    shutil.copytree(whole / "adapter", whole / "inner")
    save_file(inner, whole / "inner" / "adapter_model.safetensors")
    bare = {k.removeprefix("model."): v for k, v in tensors_of(whole / "model").items()}
    (whole / "bare").mkdir()
    save_file(bare, whole / "bare" / "model.safetensors")
    merge(whole, "a")
    merge(whole, "b", adapter="inner")
    merge(whole, "c", model="bare")
    a, b, c = (tensors_of(whole / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(a[name], c[name.removeprefix("model.")]) for name in a)


def test_conv1d_and_replaced_modules(tmp_path):
    base = gpt2(tmp_path / "model")
    extra = {"targets": ["c_attn", "c_fc"], "basis": "independent", "modules_to_save": ["ln_f"]}
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = save_adapter(base, tmp_path / "adapter", **extra)
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    said = merge(tmp_path)
    assert "ln_f.weight" in said and f"2 layers merged into 1 file of {tmp_path / 'out'}\n" in said
    assert (tmp_path / "out" / "randlora_merged.json").read_text().endswith("}\n")
    tokens = torch.randint(0, 40, (2, 6))
    merged = type(base).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(tokens).logits, model(tokens).logits)


def test_diagonals_of_another_dtype(whole):
    """As PEFT casts them."""
    file = whole / "adapter" / "adapter_model.safetensors"
    dtypes = (torch.float8_e4m3fn, torch.bfloat16, torch.float64)
    state = sorted(load_file(file).items())
    cast = {n: t.to(dtypes[k % 3]) for k, (n, t) in enumerate(state) if t.is_floating_point()}
    save_file(dict(state) | cast, file)
    merge(whole)
    got = tensors_of(whole / "out")
    for name, tensor in by_peft(whole / "model", whole / "adapter").items():
        assert torch.allclose(got[name], tensor, atol=1e-6)


def test_only_what_peft_loads_is_applied(whole):
    applied = {
        f"{Q0}.base_layer.weight": torch.randn(32, 32),  # W, to which dW is added
        "model.norm.weight": torch.randn(32),  # though modules_to_save is null
    }
    added(**applied)(whole)
    (line,) = (line for line in merge(whole).splitlines() if "replaced" in line)
    assert all(name.replace(".base_layer", "") in line for name in applied)
    got = tensors_of(whole / "out")
    want = by_peft(whole / "model", whole / "adapter")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor)


YES, NO = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    "change, tied",
    [
        (lambda config: config | YES, True),
        # A model of images and text has vocab_size in its text_config, and the flag in either.
        (lambda config: {"model_type": "x", "text_config": config | NO} | YES, True),
        (lambda config: {"model_type": "x", "text_config": config | YES}, True),
        (lambda config: {"model_type": "x", "text_config": config | NO}, False),
        # transformers 4 leaves it out where True is the default.
        (lambda config: {"model_type": "gpt2", "vocab_size": 60}, True),
    ],
)
def test_a_tied_weight_is_refused(tmp_path, change, tied):
    """transformers would tie the head to the embeddings again, and the change would be lost."""
    base = sharded(tmp_path / "model", size="1GB", tie_word_embeddings=False, vocab_size=60)
    save_adapter(base, tmp_path / "adapter", targets=["lm_head"], basis="independent")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    if tied:
        paths = (tmp_path / name for name in ("model", "adapter", "out"))
        assert "lm_head.weight is tied" in refused("merge", *paths)
    else:
        merge(tmp_path)


def test_conv1d_and_linear_layers_in_one_adapter(tmp_path):
    """PEFT saves the fan_in_fan_out of the last layer alone."""
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    base = gpt2(model, tie_word_embeddings=False)
    save_adapter(base, adapter, targets=["c_proj", "lm_head"], basis="independent")
    told = "since PEFT saved the fan_in_fan_out of one layer only, "
    assert f"{told}False" in refused("merge", model, adapter, tmp_path / "out")
    # As an encoder's nn.Linear may be square, too, where the decoder has Conv1D layers.
    save_adapter(gpt2(model), tmp_path / "other", targets=["c_proj"], basis="independent")
    edit(model / "config.json", encoder={"model_type": "vit"})
    assert f"{told}True" in refused("merge", model, tmp_path / "other", tmp_path / "out")
