"""PEFT's ``target_parameters`` for RandLoRA: each parameter's layer, and how one is made."""

from typing import Any

from peft.tuners.randlora.layer import RandLoraLayer
from torch import nn

from ..nn.experts import AdaptedParameter
from .layer import AcceleratedLinear


class ParamWrapper(AdaptedParameter, AcceleratedLinear):
    """What PEFT's ``lora.ParamWrapper`` is for LoRA; PEFT finds those layers by this name."""

    base_layer: Any

    def __init__(
        self, base_layer: Any, parameter_name: str, A: Any, B: Any, adapter_name: str, config: Any
    ) -> None:
        nn.Module.__init__(self)
        RandLoraLayer.__init__(self, self._set_sizes(base_layer, parameter_name))
        self.base_layer = base_layer
        self.fan_in_fan_out = False
        self.bases, self.input_scales = {}, {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, A, B, config.r, config=config)

    def update_layer(self, adapter_name: str, A: Any, B: Any, r: int, config: Any, **kwargs: Any):
        super().update_layer(adapter_name, A, B, r, config=config, **kwargs)
        self._stack(adapter_name)
        if not config.init_weights:  # PEFT's random lambdas, for each expert
            nn.init.normal_(self.randlora_lambda[adapter_name])

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple:
        return self._base_weight().device, self._base_weight().dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "adapter_names cannot choose among adapters of target_parameters: one W + dW "
                "serves the whole batch"
            )
        return super().forward(*args, **kwargs)

    def _names(self) -> list[str]:
        if self.disable_adapters and self.merged:
            self.unmerge()
        off = self.disable_adapters or self.merged
        return [] if off else [a for a in self.active_adapters if a in self.randlora_lambda]

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        if isinstance(self.base_layer, ParamWrapper):
            self.base_layer.unload_and_optionally_merge_module(*args, **kwargs)
        return super().unload_and_optionally_merge_module(*args, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT converts matrices
