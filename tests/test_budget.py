"""The rules behind the table of docs/distributed.md, against models that exist."""

from pathlib import Path

import pytest
import torch
from torch import nn

from randlora_ext import RandLoraLinear, TernaryBasis

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from randlora_ext.distributed.budget import llama, main, methods, parser
from randlora_ext.distributed.methods import Layer, Lora, Ours, Peft, Setting, packed_bytes

PAGE = Path(__file__).parent.parent / "docs/distributed.md"
T, R = 5, 8
LAYERS = (
    Layer("0", 64, 64, True),
    Layer("1", 64, 96, True),
    Layer("2", 96, 64, False),
    Layer("3", 64, 64, False),
)
SETTING = Setting(LAYERS, blocks=1, others=0, gpus=2, tokens=T, hidden=64)


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(layer.in_features, layer.out_features) for layer in LAYERS))


@pytest.mark.parametrize(
    ("density", "support"),
    ((1 / 90, "independent"), (0.07, "independent"), (1 / 3, "independent"), (1 / 8, "balanced")),
)
@pytest.mark.parametrize("sizes", ((700, 1100), (1100, 700), (300, 300)))
def test_packed_bytes(sizes, density, support):
    whole = TernaryBasis(*sizes, 24, density, support=support)
    parts = whole.slice(inputs=range(sizes[0] // 2)), whole.slice(outputs=range(sizes[1] // 2))
    for basis in (whole, *parts):
        # Four standard deviations of the number of non-zeros, each in two lists.
        spread = 4 * (density * basis.D * basis.K) ** 0.5 * 4 * (support == "independent")
        assert packed_bytes(basis) == pytest.approx(basis.packed_bytes(), abs=spread)


def test_our_layers():
    method = Ours(R, 1 / 3, "density 1/3")
    for layer, linear in zip(LAYERS, base(), strict=True):
        adapted = RandLoraLinear(linear, r=R)
        assert method.parameters(layer) == sum(p.numel() for p in adapted.adapter_parameters())
    assert len(method.held(SETTING, cut=False)) == 2  # 64 x 64, and 96 x 64 in both directions
    assert len(method.held(SETTING, cut=True)) == 3  # and 64 x 64 is cut in two ways


def test_what_a_rank_is_said_to_hold_and_send():
    """Layer 1 is cut on its D side, layer 3 on its d side."""
    method = Ours(R, 1 / 3, "density 1/3")
    assert method.parameters_of_a_rank(LAYERS[1], 2) == 64 + 8 * 64
    assert method.parameters_of_a_rank(LAYERS[3], 2) == 64 + 8 * 32
    assert method.extra_per_step(LAYERS[1], SETTING) == 4 * (64 + 8 * 64)  # 2 (p - 1) / p is 1
    assert method.extra_per_step(LAYERS[3], SETTING) == 4 * 64
    assert Lora(R).parameters_of_a_rank(LAYERS[1], 2) == R * (64 + 48)
    assert Lora(R).extra_per_step(LAYERS[1], SETTING) == 4 * T * R


def kept_for_backward(model: nn.Module) -> int:
    """Bytes of what autograd keeps beside parameters, buffers and layers' inputs."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    inputs, kept = set(), {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args: inputs.add(args[0].untyped_storage().data_ptr())
        )
        for module in model.modules()
        if hasattr(module, "base_layer")
    ]

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(torch.randn(T, LAYERS[0].in_features, requires_grad=True))
    for hook in hooks:
        hook.remove()
    del y
    return sum(size for storage, size in kept.items() if storage not in known | inputs)


@pytest.mark.usefixtures("stock_peft")
@pytest.mark.parametrize("ours", (False, True))
def test_peft_models(tmp_path, ours):
    peft = pytest.importorskip("peft")
    targets = [layer.name for layer in LAYERS]
    if ours:
        import randlora_ext.peft

        randlora_ext.peft.enable()
    config = peft.RandLoraConfig(r=R, target_modules=targets, sparse=True, save_projection=not ours)
    model = peft.get_peft_model(base(), config)
    method = Ours(R, 1 / 3, "density 1/3") if ours else Peft(R)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == SETTING.total(method.parameters)
    rule = SETTING.total(lambda layer: method.kept(layer, SETTING))
    assert kept_for_backward(model) == rule
    if not ours:
        assert method.bases(SETTING, cut=False) == sum(4 * b.numel() for b in model.buffers())
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert method.saved(SETTING) < size < method.saved(SETTING) + 200 * len(LAYERS) * 5


def test_peft_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=R, target_modules=[layer.name for layer in LAYERS])
    model = peft.get_peft_model(base(), config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == SETTING.total(
        Lora(R).parameters
    )
    assert kept_for_backward(model) == SETTING.total(lambda layer: Lora(R).kept(layer, SETTING))


def test_the_page_shows_what_the_command_prints(capsys):
    main([])
    if not PAGE.exists():
        pytest.skip("there is no documentation beside these tests")
    assert capsys.readouterr().out.strip() in PAGE.read_text()


def test_options(capsys):
    main(["--gpus", "4", "--rank", "16", "--hidden", "1024", "--intermediate", "2816"])
    printed = capsys.readouterr().out
    assert "on 4 GPUs" in printed and "ours, r = 16, density 0.07" in printed
    assert "very_sparse (0.0312)" in printed
    args = parser().parse_args([])
    assert llama(args).weights == 70_553_706_496  # Llama 3 70B
    assert [m.name for m in methods(args)][0] == "LoRA, r = 32"
