"""torch.utils.checkpoint: plain, and with policies that name our operator, eager and compiled."""

from collections import Counter
from functools import partial

import pytest
import torch
from compile_helpers import fresh_dynamo as fresh_dynamo
from layer_helpers import small_net
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

ops = torch.ops.randlora
OURS = [ops.independent_linear.default, ops.hadamard_linear.default]


def saves(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in OURS else CheckpointPolicy.PREFER_RECOMPUTE


def recomputes(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_RECOMPUTE


class Counting(TorchDispatchMode):
    """Counts the operators that are computed, not those whose result was kept."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


def make(density=0.1, **options):
    net = small_net(density, **options)
    net[2] = nn.Linear(40, 24)  # one operator of ours is easily counted
    return net


def gradients(function, net, x):
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.autograd.grad(function(x).square().sum(), [x, *trained])


def checkpointed(net, policy):
    options = {"use_reentrant": False}
    if policy is not None:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    return lambda x: checkpoint(net, x, **options)


@pytest.mark.parametrize(
    "policy, runs, density",
    [(saves, 1, "hadamard"), (OURS, 1, 0.1), (recomputes, 2, 1 / 3), (None, 2, "hadamard")],
)
def test_policies(policy, runs, density):
    net = make(density, randlora_dropout=0.5)  # the same when it is computed again
    x = torch.randn(7, 24, requires_grad=True)
    torch.manual_seed(1)
    expected = gradients(net, net, x)
    torch.manual_seed(1)
    with Counting() as counting:
        results = gradients(checkpointed(net, policy), net, x)
    backward = ops.independent_linear_backward.default, ops.hadamard_linear_backward.default
    assert sum(counting.count[op] for op in OURS) == runs
    assert sum(counting.count[op] for op in backward) == 1
    assert counting.count[torch.ops.aten.tanh.default] == 2
    assert all(map(torch.equal, results, expected))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("policy, runs", [(saves, 1), (recomputes, 2)])
def test_policies_in_a_compiled_step(policy, runs):
    net, counts = make(), []

    def count(module, inputs):
        counts.append(sum(node.target in OURS for node in module.graph.nodes))
        return module

    backend = aot_autograd(
        fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition
    )
    x = torch.randn(7, 24, requires_grad=True)
    step = torch.compile(checkpointed(net, policy), fullgraph=True, backend=backend)
    torch.testing.assert_close(gradients(step, net, x), gradients(net, net, x))
    assert counts == [1, runs - 1]  # forward, backward
