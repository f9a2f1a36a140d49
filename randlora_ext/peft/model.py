"""PEFT's RandLoRA model that makes accelerated layers over packed bases of any density."""

import math
from collections.abc import Hashable
from contextlib import contextmanager

import peft
import torch
from peft.tuners.randlora.layer import RandLoraLayer
from peft.tuners.randlora.model import RandLoraModel
from torch import nn

from .bases import PackedBases
from .layer import Accelerated, accelerated_class
from .ternary_tensor import TernaryMatrix, TernaryTensor


class AcceleratedRandLoraModel(RandLoraModel):
    """What `randlora_ext.peft.enable` puts in the place of ``peft.RandLoraModel``.

    What differs beside the layers' class: bases are packed as soon as they are drawn; a config's
    ``density`` and ``basis``; an added adapter whose r or density is not that of the adapters there
    draws bases of its own (stock PEFT would take the first adapter's and fail on another r), which
    are those it would have alone; and ``adapter_names`` in a forward call.
    """

    @staticmethod
    def _create_new_module(*args, **kwargs) -> nn.Module:
        return accelerate_layer(RandLoraModel._create_new_module(*args, **kwargs))

    def _pre_injection_hook(
        self, model: nn.Module, config: peft.RandLoraConfig, adapter_name: str
    ) -> None:
        if getattr(config, "basis", "peft") == "generated":
            self._describe_bases(config, adapter_name)
            return
        density = getattr(config, "density", None)
        if density is None:
            super()._pre_injection_hook(model, config, adapter_name)
        else:
            self._init_randlora_A_randlora_B_sparse(config, adapter_name, sparsity=1 / density)
            for name in ("randlora_A", "randlora_B"):
                basis = getattr(self, name)[adapter_name]
                if not bool(basis.isfinite().all()):  # PEFT divides by the standard deviation, 0
                    raise ValueError(
                        f"density={density} leaves no non-zero in {name} {tuple(basis.shape)}; it "
                        f"must be well above 1 / {basis.numel()}"
                    )
        pack_model(self)

    def _describe_bases(self, config: peft.RandLoraConfig, adapter_name: str) -> None:
        """``basis="generated"``: nothing is drawn; layers generate their slice from the key."""
        out_features, in_features = self._find_dim(config)
        D, d = max(out_features, in_features), min(out_features, in_features)
        n, r, key = -(-d // config.r), config.r, config.projection_prng_key
        density = generated_density(config, d)
        value, device = 1 / math.sqrt(density), torch.device("cpu")
        # Kept out of state dicts whatever save_projection says: key and version are the basis.
        self.randlora_A = PackedBases(persistent=False)
        self.randlora_B = PackedBases(persistent=False)
        for bases, role, shape in (
            (self.randlora_A, 0, (r, 1, d)),
            (self.randlora_B, 1, (D, n, r)),
        ):
            matrix = TernaryMatrix(shape[0], shape[1] * shape[2], value, None, (key, role, density))
            bases[adapter_name] = TernaryTensor(matrix, shape, torch.float32, device)

    def _create_and_replace(
        self, randlora_config: peft.RandLoraConfig, adapter_name: str, *args, **kwargs
    ) -> None:
        if adapter_name not in self.randlora_A:
            self._add_bases(randlora_config, adapter_name)
        super()._create_and_replace(randlora_config, adapter_name, *args, **kwargs)

    def _add_bases(self, config: peft.RandLoraConfig, adapter_name: str) -> None:
        """Finds or draws the bases of an added adapter, unless stock PEFT does the same."""
        first = next(iter(self.randlora_A))
        if _recipe(config) == _recipe(self.peft_config[first]):
            return  # PEFT lets all adapters share the first one's
        A, B = self.randlora_A, self.randlora_B
        same = [n for n in A if _recipe(self.peft_config[n]) == _recipe(config)]
        if same:
            A[adapter_name], B[adapter_name] = A[same[0]], B[same[0]]
            return
        try:  # the hook starts new dictionaries
            self._pre_injection_hook(self.model, config, adapter_name)
            drawn = self.randlora_A[adapter_name], self.randlora_B[adapter_name]
        finally:
            self.randlora_A, self.randlora_B = A, B
        A[adapter_name], B[adapter_name] = drawn

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """PEFT's seam for ``model(..., adapter_names=[...])``: one adapter per row of the batch."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names cannot be given in training mode; call model.eval()")
        known = {name for layer in _layers(self) for name in layer.randlora_lambda}
        unknown = sorted(set(names) - known - {"__base__"})
        if unknown:
            raise ValueError(f"adapter_names has unknown {unknown}; known are {sorted(known)}")
        beams = kwargs.get("num_beams")
        if isinstance(beams, int) and beams > 1:  # every input becomes `beams` neighbouring rows
            names = [name for name in names for _ in range(beams)]

        def give_names(module, args, kwargs):
            return args, {**kwargs, "adapter_names": names}

        hooks = [
            layer.register_forward_pre_hook(give_names, with_kwargs=True)
            for layer in _layers(self)
            if isinstance(layer, Accelerated)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _layers(model: nn.Module) -> list[RandLoraLayer]:
    return [module for module in model.modules() if isinstance(module, RandLoraLayer)]


def accelerate_layer(layer: nn.Module) -> nn.Module:
    """Gives a RandLoRA layer of PEFT its accelerated class, in place."""
    accelerated = accelerated_class(type(layer))
    if accelerated is not None:
        layer.__class__ = accelerated
        layer.randlora_A, layer.randlora_B = layer.randlora_A, layer.randlora_B  # as it keeps them
    return layer


def pack_model(model: RandLoraModel) -> None:
    """Puts packed dictionaries in the place of PEFT's dense ones."""
    for name in ("randlora_A", "randlora_B"):
        bases = getattr(model, name)
        if not isinstance(bases, PackedBases):
            setattr(model, name, PackedBases.of(bases))


def generated_density(config: peft.RandLoraConfig, d: int) -> float:
    """The density of a generated basis: as said, or what PEFT's flags mean for d features."""
    if config.density is not None:
        return config.density
    return 1 / math.sqrt(d) if config.very_sparse else 1 / 3


def _recipe(config: peft.RandLoraConfig) -> Hashable:
    """What bases are drawn by, beside key and layer sizes.

    The flags of stock PEFT are left out: its added adapters share the first one's bases whatever
    their flags, and saved models depend on that.
    """
    return config.r, getattr(config, "density", None), getattr(config, "basis", "peft")
