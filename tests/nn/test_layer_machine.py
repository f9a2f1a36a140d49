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
from mergeable import bits_of
from property_cases import DEEP, densities, examples, seeds
from torch.nn import functional as F

from randlora_ext import RandLoraLinear

pytestmark = pytest.mark.filterwarnings("ignore:(r = |the adapters|.*base_layer.weight)")


class Machine(RuleBasedStateMachine):
    """W, the merged update, and whether the layer is disabled, kept apart from the layer."""

    @initialize(
        in_features=st.integers(1, 30),
        out_features=st.integers(1, 30),
        layer_type=st.sampled_from(["linear", "linear", "subclass", "conv1d"]),
        bias=st.booleans(),
        r=st.integers(1, 9),
        density=densities | st.none(),
        key=seeds,
    )
    def make(self, in_features, out_features, layer_type, bias, r, density, key):
        base = make_base(in_features, out_features, layer_type, bias, torch.float64)
        self.W = base.weight.detach().clone()
        self.layer = RandLoraLinear(base, r, density=density, seed=key)
        self.merged, self.disabled = None, False
        self.x = torch.randn(5, in_features, dtype=torch.float64)

    def delta(self):
        layer, name = self.layer, "default"
        diagonals = layer.randlora_lambda[name].detach(), layer.randlora_gamma[name].detach()
        scale = layer.randlora_input_scale[name] if name in layer.randlora_input_scale else None
        return delta_by_reference(layer.bases[name], *diagonals, layer.scaling[name], scale)

    # ---- what can be done -------------------------------------------------------------------

    @rule(seed=st.integers(0, 99))
    def train(self, seed):
        """Also while it is merged: W + dW stays what was merged."""
        make = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                if parameter.requires_grad:
                    new = torch.randn(parameter.shape, generator=make, dtype=torch.float64)
                    parameter.copy_(new)

    @rule(seed=st.integers(0, 99))
    def calibrate(self, seed):
        scale = torch.rand(self.layer.in_features, generator=torch.Generator().manual_seed(seed))
        if self.merged is not None:
            with pytest.raises(RuntimeError, match="merged"):
                self.layer.set_input_scale("default", scale + 0.5)
        elif self.layer.randlora_input_scale:
            self.layer.set_input_scale("default", scale + 0.5)

    @rule(safe=st.booleans())
    def merge(self, safe):
        if self.merged is None:
            self.merged = self.delta()
            self.layer.merge(safe)
        else:
            with pytest.raises(ValueError, match="merged already"):
                self.layer.merge(safe)

    @precondition(lambda self: self.merged is not None)
    @rule()
    def unmerge(self):
        self.layer.unmerge()
        self.merged = None

    @rule(disabled=st.booleans())
    def switch(self, disabled):
        self.layer.disabled = self.disabled = disabled

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how):
        if how == "deepcopy" or type(self.layer.base_layer).__name__ == "Special":  # a local class
            self.layer = copy.deepcopy(self.layer)
        else:
            self.layer, _ = pickled(self.layer)

    @precondition(lambda self: self.merged is None)
    @rule(assign=st.booleans())
    def reload(self, assign):
        other = copy.deepcopy(self.layer)
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(torch.nan)
        other.load_state_dict(self.layer.state_dict(), assign=assign)
        self.layer = other

    @rule(way=st.sampled_from(["shape", "dtype", "seed", "merged"]), at=st.integers(0, 1))
    def load_a_bad_state(self, way, at):
        if way == "merged" and self.merged is None:
            return
        name = ("randlora_lambda.default", "randlora_gamma.default")[at]
        record = "randlora_record.default._extra_state"
        state = self.layer.state_dict()
        state |= {k: torch.full_like(v, 7.0) for k, v in state.items() if k != record}
        if way == "shape":
            state[name] = state[name][..., None]
        elif way == "dtype":
            state[name] = state[name].long()
        elif way == "seed":
            basis = self.layer.bases["default"]
            base = make_base(basis.in_features, basis.out_features)
            other = RandLoraLinear(base, basis.r, seed=basis.seed ^ 1, basis=basis.kind)
            state[record] = other.state_dict()[record]
        with pytest.raises(RuntimeError, match="does not fit"):
            self.layer.load_state_dict(state)

    # ---- what holds at any time -------------------------------------------------------------

    @invariant()
    def computes_what_it_should(self):
        layer, weight = self.layer, self.W.T if self.layer.fan_in_fan_out else self.W
        if self.merged is not None:
            weight = weight + self.merged
        elif not self.disabled:
            weight = weight + self.delta()
        expected = F.linear(self.x, weight, layer.bias)
        assert relative(layer(self.x).detach(), expected.detach()) < 1e-9

    @invariant()
    def tells_the_truth(self):
        layer = self.layer
        assert layer.merged == (self.merged is not None) and layer.disabled == self.disabled
        assert layer.merged or torch.equal(bits_of(layer.weight), bits_of(self.W))
        trained = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert trained == {"randlora_lambda.default", "randlora_gamma.default"}
        own = trained | {"randlora_record.default._extra_state"}
        if layer.bases["default"].kind == "hadamard":
            own.add("randlora_input_scale.default")
        assert {k for k in layer.state_dict() if not k.startswith("base_layer.")} == own


TestMachine = Machine.TestCase
TestMachine.settings = settings(examples(12, 400), stateful_step_count=50 if DEEP else 15)
