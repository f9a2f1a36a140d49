"""RandLoraLinear under any sequence of what can be done to it, against the oracle in float64.

HYPOTHESIS_PROFILE=deep python -m pytest tests/nn/test_layer_machine.py
"""

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from layer_cases import delta_by_reference
from layer_helpers import make_base, pickled, relative
from property_cases import DEEP, densities, examples, seeds
from torch.nn import functional as F

from randlora_ext import RandLoraLinear
from randlora_ext.nn.merging import KEEP_WEIGHT

NAMES = ("default", "two", "three")
names = st.sampled_from(NAMES)
subsets = st.lists(names, unique=True, max_size=3)


class Machine(RuleBasedStateMachine):
    """`state` holds the merged and active names and whether the layer is disabled, kept apart."""

    @initialize(
        in_features=st.integers(1, 30),
        out_features=st.integers(1, 30),
        layer_type=st.sampled_from(["linear", "linear", "subclass", "conv1d"]),
        bias=st.booleans(),
        r=st.integers(1, 9),
        density=densities,
        key=seeds,
    )
    def make(self, in_features, out_features, layer_type, bias, r, density, key):
        base = make_base(in_features, out_features, layer_type, bias, torch.float64)
        self.W = base.weight.detach().clone()
        self.layer = RandLoraLinear(base, r, density=density, seed=key, basis="independent")
        self.merged, self.active, self.disabled = [], ["default"], False
        self.x = torch.randn(5, in_features, dtype=torch.float64)

    # ---- what can be done -------------------------------------------------------------------

    @rule(name=names, r=st.integers(1, 9), density=densities | st.none(), key=seeds)
    def add(self, name, r, density, key):
        basis = "hadamard" if density is None else "independent"
        if name in self.merged:
            with pytest.raises(ValueError, match="merged"):
                self.layer.update_layer(name, r, 3.0 * r, density, key, basis=basis)
        else:
            self.layer.update_layer(name, r, 3.0 * r, density, key, basis=basis)

    @rule(name=names, seed=st.integers(0, 99))
    def train(self, name, seed):
        if name in self.layer.bases and name not in self.merged:
            make = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for diagonals in (self.layer.randlora_lambda, self.layer.randlora_gamma):
                    p = diagonals[name]
                    p.copy_(torch.randn(p.shape, generator=make, dtype=torch.float64))

    @rule(chosen=subsets)
    def choose(self, chosen):
        if all(name in self.layer.bases for name in chosen):
            self.layer.set_adapter(chosen)
            self.active = chosen
        else:
            with pytest.raises(ValueError, match="must be one of"):
                self.layer.set_adapter(chosen)

    @rule(chosen=subsets, keep=st.sampled_from(KEEP_WEIGHT))
    def merge(self, chosen, keep):
        if self.disabled or any(
            name in self.merged or name not in self.layer.bases for name in chosen
        ):
            with pytest.raises((ValueError, RuntimeError)):
                self.layer.merge(adapter_names=chosen, keep_weight=keep)
        else:
            self.layer.merge(True, chosen, keep_weight=keep)
            self.merged = self.merged + chosen

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        self.layer.unmerge()
        self.merged = []

    @rule(disabled=st.booleans())
    def switch(self, disabled):
        self.layer.disable() if disabled else self.layer.enable()
        self.disabled = disabled
        self.merged = [] if disabled else self.merged

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how):
        if how == "deepcopy" or type(self.layer.base_layer).__name__ == "Special":  # a local class
            self.layer = copy.deepcopy(self.layer)
        else:
            self.layer, _ = pickled(self.layer)

    @precondition(lambda self: not self.merged)
    @rule()
    def reload(self):
        other = copy.deepcopy(self.layer)
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(torch.nan)
        other.load_state_dict(self.layer.state_dict())
        self.layer = other

    @rule(way=st.sampled_from(["shape", "dtype", "merged"]), at=st.integers(0, 9))
    def load_a_bad_state(self, way, at):
        state = {k: torch.full_like(v, 7.0) for k, v in self.layer.state_dict().items()}
        name = sorted(k for k in state if k.startswith("randlora_"))[at % (2 * len(self.layer.r))]
        if way == "merged" and not self.merged:
            return
        bad = {"shape": state[name][..., None], "dtype": state[name].long()}.get(way, state[name])
        told = r"has merged .*call unmerge\(\) first" if way == "merged" else "which is unchanged"
        with pytest.raises(RuntimeError, match=told):
            self.layer.load_state_dict(state | {name: bad})

    # ---- what holds at any time -------------------------------------------------------------

    @invariant()
    def computes_what_it_should(self):
        layer = self.layer
        weight = self.W.T if layer.fan_in_fan_out else self.W
        part = [] if self.disabled else self.active
        for name in {*self.merged, *part}:
            diagonals = layer.randlora_lambda[name].detach(), layer.randlora_gamma[name].detach()
            weight = weight + delta_by_reference(layer.bases[name], *diagonals, layer.scaling[name])
        expected = F.linear(self.x, weight, layer.bias)
        assert relative(layer(self.x).detach(), expected.detach()) < 1e-9

    @invariant()
    def tells_the_truth(self):
        layer = self.layer
        assert layer.merged_adapters == self.merged and layer.active_adapters == self.active
        assert layer.disabled == self.disabled
        for name in layer.bases:
            trained = name in self.active and not self.disabled
            assert layer.randlora_lambda[name].requires_grad == trained
            assert layer.randlora_gamma[name].requires_grad == trained
        assert not layer.base_layer.weight.requires_grad
        own = {f"randlora_{d}.{name}" for d in ("lambda", "gamma") for name in layer.bases}
        scaled = [name for name, basis in layer.bases.items() if basis.kind == "hadamard"]
        own |= {f"randlora_input_scale.{name}" for name in scaled}
        assert {k for k in layer.state_dict() if not k.startswith("base_layer.")} == own


TestMachine = Machine.TestCase
TestMachine.settings = settings(examples(12, 400), stateful_step_count=50 if DEEP else 15)
