"""torch.compile: one graph, forward and backward, few of them over changing T, numbers of eager;
torch.export and AOTInductor, run in a process of their own."""

import gc
import weakref

import pytest
import torch
from compile_helpers import assert_steps_agree, compiled, graphs, mixed_net, needs_compiler, step
from compile_helpers import fresh_dynamo as fresh_dynamo
from layer_cases import CALLS, call, make_layer, run_python
from layer_helpers import randomize, small_net
from torch import nn
from torch.export import Dim

from randlora_ext import RandLoraLinear, delta_weight
from randlora_ext.ops import dense

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def x_of(tokens):
    return torch.randn(tokens, 24, generator=torch.Generator().manual_seed(tokens))


@needs_compiler
def test_inductor():
    eager = mixed_net(seed=77)  # of no other test: packed while it is traced
    fast = torch.compile(eager, fullgraph=True)
    for tokens in (7, 9, 40):
        assert_steps_agree(fast, eager, x_of(tokens))
    assert graphs() == 2  # one for 7 tokens, one for any number


@pytest.mark.parametrize("low", [False, True])
def test_two_graphs_for_any_number_of_tokens(low):
    eager = mixed_net()
    fast = compiled(eager)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        for tokens in (2, 3, 17, 300, 5000, 4, 2):
            assert_steps_agree(fast, eager, x_of(tokens), 1e-2 if low else 1e-5)
            assert fast(x_of(tokens)).dtype == (torch.bfloat16 if low else torch.float32)
    # The first, static one, and that for any number; each for x with and without a gradient.
    assert graphs() == 4
    assert fast(x_of(7)).dtype == torch.float32


def test_dynamic_sizes_and_tokens_that_only_the_data_tell():
    eager = small_net()[0]
    fast = compiled(eager, dynamic=True)
    for tokens in (7, 9):
        assert torch.equal(fast(x_of(tokens)), eager(x_of(tokens)))
    assert graphs() == 1
    fast = compiled(eager)
    for sizes in ((2, 7), (3, 9), (5, 4)):
        x = torch.randn(*sizes, 24)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        assert torch.equal(fast(x), eager(x))
    assert graphs() == 2
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        experts = compiled(lambda x, chosen: eager(x[chosen]))
        for count in (3, 12, 0):
            x, chosen = x_of(12), torch.arange(12) < count
            assert torch.equal(experts(x, chosen), eager(x[chosen]))
    assert graphs() == 3


def test_layers_of_one_shape_share_what_is_compiled():
    # Regional compilation: Dynamo gives up after 8 recompilations of one function.
    torch.manual_seed(0)
    layers = [randomize(RandLoraLinear(nn.Linear(24, 40), r=5, seed=5), seed=k) for k in range(12)]
    x = x_of(7)
    expected = [step(layer, x) for layer in layers]
    for layer in layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for layer, wanted in zip(layers, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step(layer, x), wanted, strict=True))
    assert graphs() == 1


def test_states_of_a_layer():
    layer, x = small_net(randlora_dropout=0.5)[0], x_of(7)
    fast = compiled(layer)

    def check():
        results = []
        for each in (fast, layer):
            torch.manual_seed(1)  # for dropout
            results.append(each(x))
        assert torch.equal(*results)

    def disable():
        layer.disabled = True

    check()
    for change in (layer.eval, layer.merge, layer.unmerge, disable):
        change()
        check()


@pytest.mark.parametrize("shape", [(24, 40, 5), (40, 24, 5)], ids=str)
@CALLS
def test_every_function_of_every_kind_of_basis(shape, basis):
    layer = make_layer(*shape, basis, 7, torch.float32, seed=31)  # of no other test
    basis, dense_a = layer.basis, layer.basis.dense()[0]

    def everything(lam, gam):
        return [
            dense.scaled(dense_a, lam, gam),
            delta_weight(basis, lam, gam, 0.5),
            call(layer, bias=None, lam=lam, gam=gam),
        ]

    def run(function):
        leaves = [layer.lam.clone().requires_grad_(), layer.gam.clone().requires_grad_()]
        results = function(*leaves)
        total = sum(k * result.sum() for k, result in enumerate(results, 1))
        return [*results, *torch.autograd.grad(total, leaves)]

    torch.testing.assert_close(run(compiled(everything)), run(everything))


def test_transforms_run_beside_the_graph():
    # Dynamo cannot trace an autograd.Function under torch.func; it must say so or step aside.
    eager = mixed_net()
    parameters = {k: p.detach() for k, p in eager.named_parameters() if p.requires_grad}

    def function(parameters, x):
        return torch.func.functional_call(eager, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(function), (None, 0))
    results = torch.compile(each, backend="aot_eager")(parameters, x_of(4))
    for name, wanted in each(parameters, x_of(4)).items():
        torch.testing.assert_close(results[name], wanted)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="runs uncompiled under torch.func"):
        compiled(each)(parameters, x_of(4))


def test_a_compiled_model_holds_its_bases_no_longer_than_it_lives():
    eager = small_net(seed=123)
    fast = compiled(eager)
    step(fast, x_of(7))
    packed = [
        weakref.ref(t) for layer in (eager[0], eager[2]) for t in layer.bases["default"].packed()
    ]
    del eager, fast
    torch._dynamo.reset()
    gc.collect()
    assert packed and all(t() is None for t in packed)


# ---- torch.export and AOTInductor of models with unmerged adapters


RUN = """
import sys, torch
import randlora_ext  # registers the operators, and nothing else of it is used
program, package, cases = sys.argv[1:]
programs = torch.export.load(program).module(), torch._inductor.aoti_load_package(package)
for x, y in torch.load(cases):
    for program in programs:
        result = program(x)
        assert result.shape == y.shape and (result - y).norm() < 1e-5 * y.norm()
"""


def export(model, dim, strict=False):
    sizes = None if dim is None else ({0: dim},)
    return torch.export.export(model, (torch.randn(7, 24),), dynamic_shapes=sizes, strict=strict)


@pytest.mark.parametrize("density, strict", [(0.1, False), (1 / 3, True), ("hadamard", False)])
def test_an_exported_program(density, strict):
    model = small_net(density, seed=55 + strict).eval()  # not packed yet
    program = export(model, Dim.DYNAMIC, strict)
    name = "hadamard_linear" if density == "hadamard" else "independent_linear"
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(f"randlora.{name}.default") == 2  # base and adapter in one, for any T
    assert sum(target.startswith("randlora.") for target in targets) == 2
    # The two layers' shapes are one turned around: their packed tensors are the same constants.
    packed = [t for t in model[0].bases["default"].packed() if t.numel()]  # without CUDA's tables
    assert len(program.constants) == len(packed)
    for constant in program.constants.values():
        alike = (t for t in packed if t.dtype == constant.dtype)
        assert any(torch.equal(constant, t) for t in alike)
    for tokens in (1, 7, 300):
        x = torch.randn(tokens, 24)
        torch.testing.assert_close(program.module()(x), model(x))
    # and the basis that the export packed serves eager calls
    assert all(type(t) is torch.Tensor for t in packed)
    model(x).sum().backward()


@pytest.mark.slow  # four minutes, most of them in the C++ compiler
@needs_compiler
def test_a_program_and_an_aotinductor_package_in_another_process(tmp_path):
    model = mixed_net().eval()
    program = export(model, Dim("T", min=1, max=4096))
    files = [str(tmp_path / name) for name in ("program.pt2", "package.pt2", "cases.pt")]
    torch.export.save(program, files[0])
    torch._inductor.aoti_compile_and_package(program, package_path=files[1])
    with torch.no_grad():
        torch.save([(x, model(x)) for x in (torch.randn(T, 24) for T in (1, 7, 300))], files[2])
    run_python("-c", RUN, *files)
