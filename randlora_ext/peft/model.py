"""PEFT's RandLoRA model that makes `AcceleratedLinear` layers and draws bases of any density."""

from collections.abc import Hashable

import peft
from peft.tuners.randlora.layer import Linear
from peft.tuners.randlora.model import RandLoraModel
from torch import nn

from .layer import AcceleratedLinear


class AcceleratedRandLoraModel(RandLoraModel):
    """What `randlora_ext.peft.enable` puts in the place of ``peft.RandLoraModel``.

    Two things differ beside the layers' class: a config's ``density``, and that an added adapter
    whose r or density is not that of the adapters there draws bases of its own (stock PEFT would
    take the first adapter's and fail on another r); they are those it would have alone.
    """

    @staticmethod
    def _create_new_module(*args, **kwargs) -> nn.Module:
        module = RandLoraModel._create_new_module(*args, **kwargs)
        if type(module) is Linear:  # not the quantized ones
            module.__class__ = AcceleratedLinear
        return module

    def _pre_injection_hook(
        self, model: nn.Module, config: peft.RandLoraConfig, adapter_name: str
    ) -> None:
        density = getattr(config, "density", None)
        if density is None:
            super()._pre_injection_hook(model, config, adapter_name)
            return
        self._init_randlora_A_randlora_B_sparse(config, adapter_name, sparsity=1 / density)
        for name in ("randlora_A", "randlora_B"):
            basis = getattr(self, name)[adapter_name]
            if not bool(basis.isfinite().all()):  # PEFT divides by the standard deviation, 0
                raise ValueError(
                    f"density={density} leaves no non-zero in {name} {tuple(basis.shape)}; it must "
                    f"be well above 1 / {basis.numel()}"
                )

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


def _recipe(config: peft.RandLoraConfig) -> Hashable:
    """What bases are drawn by, beside key and layer sizes.

    The flags of stock PEFT are left out: its added adapters share the first one's bases whatever
    their flags, and saved models depend on that.
    """
    return config.r, getattr(config, "density", None)
