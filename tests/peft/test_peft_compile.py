"""PEFT models on our layers: torch.compile in one graph, torch.export."""

import pytest
import torch
from cli_helpers import llama
from compile_helpers import assert_steps_agree, graphs, needs_guards
from compile_helpers import fresh_dynamo as fresh_dynamo
from peft_helpers import adapted, config, layers, made, runs_on_kernels
from torch import nn
from torch.export import Dim

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("kind", [{"sparse": True}, {"basis": "hadamard"}, {}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph_for_any_number_of_tokens(kind, dtype):
    eager = made(projection_prng_key=17, **kind).to(dtype)  # not packed before it is traced
    fast = compiled(eager)
    for tokens in (7, 9, 30):
        x = torch.randn(2, tokens, 24).to(dtype)
        assert_steps_agree(fast, eager, x, 1e-5 if dtype == torch.float32 else 1e-2)
    assert graphs() == 2  # one for 7 tokens, one for any number
    assert runs_on_kernels(eager)


def test_dropout_and_two_adapters():
    eager = made(targets="a", sparse=True, randlora_dropout=0.5)
    x = torch.randn(7, 24)
    fast = compiled(eager)
    torch.manual_seed(1)
    y = fast(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, eager(x))
    eager.add_adapter("two", config(5, targets="a", sparse=True))
    eager.base_model.set_adapter(["default", "two"])
    assert_steps_agree(compiled(eager.eval()), eager, x)


@needs_guards
def test_other_bases_are_noticed():
    eager, other = (made(targets="a", projection_prng_key=key, sparse=True) for key in (0, 1))
    x = torch.randn(7, 24)
    fast = compiled(eager)
    before = fast(x)
    for name in ("randlora_A", "randlora_B"):
        bases = getattr(eager.base_model, name)
        bases["default"] = getattr(other.base_model, name)["default"].dense()
        after = fast(x)
        assert torch.equal(after, eager(x)) and not torch.equal(after, before)
        before = after


def test_blocks_of_one_shape_share_what_is_compiled():
    torch.manual_seed(0)
    base = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(24, 24), nn.Tanh())))
    model = adapted(base, map(str, range(0, 24, 2)), density=0.2)
    x = torch.randn(7, 24, requires_grad=True)  # as between blocks: without, the first differs
    expected = model(x)
    for block in layers(model):
        block.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(model(x), expected)
    assert graphs() == 1


def test_a_language_model_in_one_graph():
    eager = adapted(llama(num_hidden_layers=1).train(), ["q_proj", "down_proj"], sparse=True)
    assert_steps_agree(compiled(eager), eager, torch.randint(0, 50, (2, 7)))
    assert graphs() == 1


def test_an_exported_model(tmp_path):
    """It holds operators and plain tensors alone; test_export.py loads such in a process."""
    model = made(projection_prng_key=23, sparse=True).eval()
    x = torch.randn(7, 24)
    program = torch.export.export(model.base_model.model, (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert {name.partition(".")[0] for name in called} == {"aten", "randlora"}
    assert sum("randlora.independent_linear" in name for name in called) == 3
    assert all(type(t) is torch.Tensor for t in program.constants.values())
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for tokens in (1, 7, 90):
        row = torch.randn(tokens, 24)
        torch.testing.assert_close(loaded(row), model(row), rtol=1e-4, atol=1e-5)
    model(x).sum().backward()  # the bases that the export packed serve training
