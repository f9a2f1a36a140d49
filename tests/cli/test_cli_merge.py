"""``randlora merge``: the files of a sharded model, against PEFT's own merging."""

import json
import shutil

import pytest
import torch
from cli_helpers import KINDS, Q0, added, edit, gpt2, llama, refused, run, save_adapter, sharded
from peft_helpers import accelerated, opened, shake
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.usefixtures("one_thread", "stock_peft"),
    pytest.mark.filterwarnings("ignore:Specified to not save", "ignore:RandLoRA layers of this"),
]


def by_peft(model_folder, adapter, dtype, out):
    """What merge_and_unload and save_pretrained write."""
    from transformers import AutoModelForCausalLM

    accelerated.enable()
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    merged = opened(adapter, lambda: base).merge_and_unload(safe_merge=True)
    merged.save_pretrained(out)
    return tensors_of(out)


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


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_merge_and_unload(tmp_path, kind, dtype):
    base = sharded(tmp_path / "model", dtype)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    save_adapter(base, tmp_path / "adapter", **kind)
    said = merge(tmp_path)
    assert "8 layers merged" in said and "merging model-00001-of" in said
    got = tensors_of(tmp_path / "out")
    want = by_peft(tmp_path / "model", tmp_path / "adapter", dtype, tmp_path / "peft")
    before = tensors_of(tmp_path / "model")
    assert got.keys() == want.keys() == before.keys()
    for name, tensor in want.items():
        assert got[name].dtype == dtype
        if "lm_head" in name or "embed" in name or "norm" in name:
            assert torch.equal(got[name], before[name])
        # Sums in another order may fall on the other side of a rounding boundary.
        ulp = 2.0**-7 if dtype is torch.bfloat16 else 1e-6
        assert ((got[name] - tensor).abs() <= ulp * tensor.abs() + 1e-7).all(), name
        assert (got[name] == tensor).float().mean() > 0.9 or dtype is torch.float32, name
    changed = [name for name in got if not torch.equal(got[name], before[name])]
    assert len(changed) == 8


def test_the_folder_opens_and_the_sources_stay(tmp_path):
    from transformers import AutoModelForCausalLM

    base = sharded(tmp_path / "model")
    model = save_adapter(base, tmp_path / "adapter", basis="independent")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"unmerged")
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert "pytorch_model.bin" in merge(tmp_path)
    assert all(p.read_bytes() == content for p, content in files.items())
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model", "out"]
    tokens = torch.randint(0, 50, (2, 6))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, model(tokens).logits)


def test_one_file_and_an_adapter_of_the_inner_model(tmp_path):
    """Its paths lack "model."; the reverse, a checkpoint without it, as well."""
    base = sharded(tmp_path / "model", size="1GB")
    model = save_adapter(base, tmp_path / "whole", basis="independent")
    saved = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    inner = {k.replace("model.model.model.", "model.model."): v for k, v in saved.items()}
    shutil.copytree(tmp_path / "whole", tmp_path / "inner")
    save_file(inner, tmp_path / "inner" / "adapter_model.safetensors")
    merge(tmp_path, "a", adapter="whole")
    merge(tmp_path, "b", adapter="inner")
    bare = {k.removeprefix("model."): v for k, v in tensors_of(tmp_path / "model").items()}
    (tmp_path / "bare").mkdir()
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    merge(tmp_path, "c", model="bare", adapter="whole")
    a, b, c = (tensors_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(a[name], c[name.removeprefix("model.")]) for name in a)
    assert model.base_model.randlora_A["default"].shape[0] == 5


def test_conv1d_and_replaced_modules(tmp_path):
    base = gpt2(tmp_path / "model")
    extra = {"targets": ["c_attn", "c_fc"], "basis": "independent", "modules_to_save": ["ln_f"]}
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = save_adapter(base, tmp_path / "adapter", **extra)
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    assert "ln_f.weight" in merge(tmp_path)
    tokens = torch.randint(0, 40, (2, 6))
    merged = type(base).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(tokens).logits, model(tokens).logits)


def test_diagonals_of_another_dtype(tmp_path):
    """As PEFT casts them."""
    base = sharded(tmp_path / "model")
    save_adapter(base, tmp_path / "adapter", basis="independent")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    dtypes = (torch.float8_e4m3fn, torch.bfloat16, torch.float64)
    state = sorted(load_file(file).items())
    save_file({name: t.to(dtypes[k % 3]) for k, (name, t) in enumerate(state)}, file)
    merge(tmp_path)
    got = tensors_of(tmp_path / "out")
    want = by_peft(tmp_path / "model", tmp_path / "adapter", torch.float32, tmp_path / "peft")
    assert all(torch.allclose(got[name], tensor, atol=1e-6) for name, tensor in want.items())


@pytest.mark.parametrize(
    ("name", "shape", "applied"),
    [
        (f"{Q0}.weight", (32, 32), False),  # an adapted layer has no such parameter
        (f"{Q0}.bias", (32,), False),
        (f"{Q0}.base_layer.weight", (32, 32), True),  # W, to which dW is added
        ("model.norm.weight", (32,), True),  # though modules_to_save is null
    ],
)
def test_only_what_peft_loads_is_applied(tmp_path, name, shape, applied):
    base = sharded(tmp_path / "model")
    save_adapter(base, tmp_path / "adapter", basis="independent")
    added(**{name: torch.randn(shape)})(tmp_path)
    said = merge(tmp_path)
    assert ("replaced" in said) == applied and ("ignored" in said) != applied
    assert name.replace(".base_layer", "") in said
    got = tensors_of(tmp_path / "out")
    want = by_peft(tmp_path / "model", tmp_path / "adapter", torch.float32, tmp_path / "peft")
    assert got.keys() == want.keys() | {"lm_head.weight"}
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor)


@pytest.mark.parametrize("kind", ["generated", "density"])
def test_the_key_decides_the_bases(tmp_path, kind):
    """The other fields may be gone, as after a program that knows PEFT's alone."""
    base = sharded(tmp_path / "model")
    save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    merge(tmp_path, "before")
    file = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text())
    kept = {key: value for key, value in fields.items() if key not in ("density", "basis")}
    file.write_text(json.dumps(kept | {"task_type": None}))
    merge(tmp_path, "after")
    before, after = tensors_of(tmp_path / "before"), tensors_of(tmp_path / "after")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    base = ("--base", tmp_path / "model")
    convert = ("convert", tmp_path / "adapter", tmp_path / "peft", "--to", "peft", *base)
    merging = ("merge", tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    for change in ({"density": 0.5}, {"very_sparse": True}):
        edit(file, **change)
        for action in (merging, convert):
            assert "contradicts" in refused(*action)
        edit(file, density=None, very_sparse=False)
    assert run(*convert)[0] == 0


def test_a_tied_weight_is_refused(tmp_path):
    """transformers would tie the head to the embeddings again, and the change would be lost."""
    base = sharded(tmp_path / "model", tie_word_embeddings=True, vocab_size=60)
    state = tensors_of(tmp_path / "model")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    shutil.rmtree(tmp_path / "model")
    base.config.save_pretrained(tmp_path / "model")
    save_file(state, tmp_path / "model" / "model.safetensors")
    save_adapter(base, tmp_path / "adapter", targets=["lm_head"], basis="independent")
    assert "lm_head.weight is tied" in refused(
        "merge", tmp_path / "model", tmp_path / "adapter", tmp_path / "out"
    )


def test_stochastic_rounding(tmp_path):
    """Changes far below an ulp vanish when rounded to nearest, and count on average otherwise."""
    base = sharded(tmp_path / "model", torch.bfloat16)
    save_adapter(base, tmp_path / "adapter", basis="independent", randlora_alpha=0.0005)
    for name, seed in {"near": None, "s1": 1, "again": 1, "s2": 2}.items():
        merge(tmp_path, name, *(("--rounding-seed", seed) if seed else ()))
    before, near, s1, again, s2 = (
        tensors_of(tmp_path / name) for name in ("model", "near", "s1", "again", "s2")
    )
    names = [name for name in before if name.endswith(("up_proj.weight", "down_proj.weight"))]
    for name in names:
        assert torch.equal(s1[name], again[name]) and not torch.equal(s1[name], s2[name])
        assert (near[name] != before[name]).sum() < (s1[name] != before[name]).sum()
    ups = [f"model.layers.{k}.mlp.up_proj.weight" for k in (0, 1)]
    moved = [s1[name] != before[name] for name in ups]
    assert not torch.equal(*moved)  # layers round by words of their own


def test_rounding_seed_needs_16_bits(tmp_path):
    sharded(tmp_path / "f32")
    sharded(tmp_path / "bf16", torch.bfloat16)
    save_adapter(llama(), tmp_path / "ternary", basis="independent")
    for name, seed, told in (("f32", 3, "float32"), ("bf16", -1, "rounding-seed")):
        merging = ("merge", tmp_path / name, tmp_path / "ternary", tmp_path / "o")
        assert told in refused(*merging, "--rounding-seed", seed)
    assert not (tmp_path / "o").exists()
