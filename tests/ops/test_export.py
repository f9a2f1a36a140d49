"""torch.export and AOTInductor of models with unmerged adapters, run in a process of their own."""

import pytest
import torch
from compile_helpers import mixed_net, needs_compiler
from layer_cases import run_python
from layer_helpers import randomize, small_net
from torch.export import Dim

RUN = """
import sys, torch
import randlora_ext  # registers the operators, and nothing else of it is used
program, package, cases = sys.argv[1:]
programs = torch.export.load(program).module(), torch._inductor.aoti_load_package(package)
for x, y in torch.load(cases):
    for program in programs:
        torch.testing.assert_close(program(x), y, rtol=1e-4, atol=1e-4)
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


def test_several_adapters_and_autocast():
    model = small_net(0.2).eval()
    model[0].update_layer("two", r=7, density=0.3, basis="independent")
    model[0].update_layer("three", r=6, basis="hadamard")
    model[0].set_adapter(["default", "two", "three"])
    randomize(model[0])
    x = torch.randn(7, 24)
    assert torch.equal(export(model, Dim.DYNAMIC).module()(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert torch.equal(export(model, None).module()(x), y)


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
