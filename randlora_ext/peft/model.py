"""PEFT's RandLoRA model with accelerated layers over packed bases, of every kind and density."""

import sys
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners.randlora.model import RandLoraModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    onload_layer,
)
from torch import Tensor, nn

from ..checks import check_alpha, check_r, warn_user
from ..nn.adapted_layer import layers_by_name, layers_by_path
from ..nn.adapter_record import RECORD
from ..nn.base_layer import check_is_called, disable_nested_tensors, features
from ..nn.experts import ADAPTERS, AdaptedModule, sizes_of_matching
from ..nn.input_scale import tensor_misfits
from ..nn.linear import DEFAULT_SCALING, more_than_d
from ..nn.merging import check_mergeable, release_weight
from ..nn.state_dict import refuse_misfits
from ..nn.uncalibrated import watch_calibration
from . import quantized
from .bases import BASIS_NAMES, PackedBufferDict, description_of_matrix, largest, new_bases
from .config import description_of_config, target_parameters
from .layer import AcceleratedLinear, AcceleratedParameter
from .misfits import check_names
from .quantized import QuantizedLinear
from .rows import adapters_by_row
from .targets import check_target, check_targets, is_linear

_PREFIX = "base_model.model."  # of names in a PeftModel, and in files


class AcceleratedRandLoraModel(RandLoraModel):
    """What `enable` puts in the place of ``peft.RandLoraModel``; docs/peft.md says what differs."""

    peft_config: dict[str, Any]
    # PEFT injects no adapters whose layers need the model. Ours hold the bases that they share.
    uses_shared_state = False

    @staticmethod
    def _create_new_module(config, A, B, adapter_name, target, **kwargs) -> nn.Module:
        check_target(target)
        make = layer_class(target)
        return make(target, A, B, adapter_name, config, features(target))

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        if isinstance(child, AcceleratedLinear):  # it is unloaded
            release_weight(child)
        # PEFT would also set the weight of what it unloads, which not every base layer has.
        setattr(parent, child_name, new_module)

    def _check_new_adapter_config(self, config: peft.RandLoraConfig) -> None:
        """Also PEFT's, of one key and ``save_projection`` among adapters on PEFT's bases alone."""
        generated = description_of_config(config)  # before anything changes: fields may contradict
        check_r(config.r)  # stock PEFT's configuration checks neither
        check_alpha("randlora_alpha", config.randlora_alpha)
        scaling = config.randlora_alpha / config.r
        # PEFT's default alpha, 640, is meant for r = 32; with r = 8 it scales dW by 80.
        if abs(scaling) > DEFAULT_SCALING and not config.inference_mode:
            warn_user(
                f"randlora_alpha={config.randlora_alpha} with r={config.r} scales dW by "
                f"{scaling:g}; examples train with at most {DEFAULT_SCALING:g}, which is "
                f"randlora_alpha={DEFAULT_SCALING * config.r:g}"
            )
        BaseTuner._check_new_adapter_config(self, config)
        if generated is None:
            configs = self.peft_config
            try:  # PEFT compares all adapters that it sees
                self.peft_config = {
                    n: c for n, c in configs.items() if not description_of_config(c)
                }
                super()._check_new_adapter_config(config)
            finally:
                self.peft_config = configs

    def inject_adapter(self, model, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # The adapter gets bases of its own; if it fails, an older one of its name keeps its bases.
        old_A = self.randlora_A.pop(adapter_name, None)
        old_B = self.randlora_B.pop(adapter_name, None)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            if old_A is not None and old_B is not None:
                self.randlora_A[adapter_name], self.randlora_B[adapter_name] = old_A, old_B
            raise
        watch_calibration(self.model, adapter_name)
        if adapter_name == "ref":
            self._copy_for_trl()

    def _copy_for_trl(self) -> None:
        """Copies "default" into "ref", which TRL has added as the reference.

        DPO, KTO, GRPO and RLOO add it with the very configuration of "default", and then copy every
        parameter whose name contains ".default.". Names of RandLoRA *end* in ".default", so the
        reference would silently be the base model. Here every parameter and buffer of the adapter
        is copied. If a mended version copies them, too, they are the same.
        """
        if "trl" not in sys.modules:
            return
        if self.peft_config["ref"] is not self.peft_config.get("default"):
            return
        with torch.no_grad():
            for layer in self.model.modules():
                if not isinstance(layer, AcceleratedLinear):
                    continue
                tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
                for name, tensor in tensors.items():
                    if name.endswith(".ref") and not name.startswith("base_layer."):
                        tensor.copy_(tensors[name.removesuffix("ref") + "default"])

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        trains = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if not autocast_adapter_dtype:  # low_cpu_mem_usage=True has taken the dtypes of a file
            for layer in self.modules():
                if isinstance(layer, AcceleratedLinear) and adapter_name in layer.randlora_lambda:
                    layer.cast_like_base(adapter_name)
        for name, parameter in self.named_parameters():  # those that PEFT has cast train
            if name in trains:
                parameter.requires_grad_(trains[name])

    def _pre_injection_hook(self, model, config, adapter_name) -> None:
        # A second inject_adapter_in_model finds the first one's layers.
        layer = next((m for m in model.modules() if isinstance(m, AcceleratedLinear)), None)
        for name in BASIS_NAMES:
            setattr(self, name, PackedBufferDict() if layer is None else getattr(layer, name))

    def _create_and_replace(
        self, config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if adapter_name not in self.randlora_A:  # this is the adapter's first layer
            self._add_bases(config, adapter_name)
        if parameter_name is not None:
            self._adapt_parameter(config, adapter_name, target, target_name, parent, parameter_name)
            return
        try:
            check_is_called(self.model, current_key, f"module {current_key!r}")
        except ValueError as error:  # not raised: files of stock PEFT must load
            warn_user(str(error))
        super()._create_and_replace(config, adapter_name, target, target_name, parent, current_key)
        disable_nested_tensors(self.model, current_key)
        getattr(parent, target_name)._path = current_key

    def _adapt_parameter(self, config, adapter_name, target, target_name, parent, name) -> None:
        """`target` has the parameter, or is already the `AdaptedModule` around what has it."""
        around = next((m for m in (target, parent) if isinstance(m, AdaptedModule)), None)
        if around is None:
            around = AdaptedModule(target)
            setattr(parent, target_name, around)
        A, B = self.randlora_A, self.randlora_B
        if name in around.adapters:
            around.adapters[name].update_layer(adapter_name, A, B, config.r, config=config)
        else:
            made = AcceleratedParameter(around.base_layer, name, A, B, adapter_name, config)
            if adapter_name not in self.active_adapter:  # as PEFT does with linear layers
                made.requires_grad_(False)
            around.adapted_parameters.add_module(name, made)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """As PEFT's, but if `safe_merge` refuses a layer, no other is merged either."""
        if safe_merge:
            self._check_safe_to_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_safe_to_merge(self, adapter_names: list[str] | None) -> None:
        self._check_merge_allowed()
        for layer in layers_by_name(self.model).values():
            assert isinstance(layer, AcceleratedLinear)
            with onload_layer(layer):  # accelerate may have put its weight elsewhere
                layer.check_safe_to_merge(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and safe_merge:
            self._check_safe_to_merge(adapter_names)
        args = merge, progressbar, safe_merge, adapter_names
        model = super()._unload_and_optionally_merge(*args)
        # PEFT finds no layers inside a module that it has replaced, such as an `AdaptedModule`.
        while any(isinstance(module, AcceleratedLinear) for module in model.modules()):
            model = super()._unload_and_optionally_merge(*args)
        return model

    def _check_target_module_exists(self, config, key: str) -> Any:
        if f".{ADAPTERS}." in key:  # ours, which may have the name of a target
            return False
        return super()._check_target_module_exists(config, key)

    def _prepare_adapter_config(self, config, model_config):
        # As PEFT's LoRA: the model's usual modules, or none of a model that PEFT does not know.
        if config.target_modules is None and target_parameters(config):
            if model_config.get("model_type") not in self.target_module_mapping:
                return config
        return super()._prepare_adapter_config(config, model_config)

    def _prepare_model(self, config, model) -> None:
        """Checks the targets before anything is drawn or replaced."""
        config = _maybe_include_all_linear_layers(config, model)
        check_targets(model, config, self._targets(config))
        smallest = min(map(min, self._sizes(config)))
        if config.r > smallest:
            warn_user(more_than_d(config.r, smallest))

    def _linear_targets(self, config: peft.RandLoraConfig) -> dict[str, nn.Module]:
        """By name, the linear layers that ``target_modules`` match, adapted ones included."""
        targets = self._targets(config).items()
        return {name: module for name, module in targets if is_linear(module)}

    def _targets(self, config: peft.RandLoraConfig) -> dict[str, nn.Module]:
        """What ``target_modules`` match, but for what lies inside of layers with adapters."""
        named = dict(self.model.named_modules())
        adapted = tuple(f"{name}." for name in named if isinstance(named[name], BaseTunerLayer))
        return {
            name: module
            for name, module in named.items()
            if name
            and not name.startswith(adapted)
            and self._check_target_module_exists(config, name)
        }

    def _sizes(self, config: peft.RandLoraConfig) -> list[tuple[int, int]]:
        """(in_features, out_features) of each layer that the adapter will have."""
        parameters = sizes_of_matching(self.model, target_parameters(config))
        of_parameters = [(p.in_features, p.out_features) for p in parameters.values()]
        return [*map(features, self._linear_targets(config).values()), *of_parameters]

    def _add_bases(self, config: peft.RandLoraConfig, adapter_name: str) -> None:
        """Takes another adapter's, as stock PEFT does, or makes new ones."""
        D, d = largest(self._sizes(config))
        A, B = self._bases_to_share(config, D, d) or new_bases(config, D, d)
        for bases, matrix in ((self.randlora_A, A), (self.randlora_B, B)):
            bases[adapter_name] = matrix
            if description_of_matrix(matrix) is None:  # PEFT's check wants the same for all
                bases.persistent = config.save_projection

    def _bases_to_share(
        self, config: peft.RandLoraConfig, D: int, d: int
    ) -> tuple[Tensor, Tensor] | None:
        """Those of an adapter of the same r and key, whatever its flags: of the same sizes or, as
        PEFT takes them of the first adapter, larger ones."""
        known = [name for name in self.randlora_A if name in self.peft_config]
        for name in known:
            other, A, B = self.peft_config[name], self.randlora_A[name], self.randlora_B[name]
            if other.r != config.r or other.projection_prng_key != config.projection_prng_key:
                continue
            if description_of_config(other) != description_of_config(config):
                continue
            fits = A.shape[-1] == d and B.shape[0] == D
            if name == known[0]:
                fits = A.shape[-1] >= d and B.shape[0] >= D
            if fits:
                larger = (A.shape[-1], B.shape[0]) != (d, D)
                if larger and description_of_config(config) is None and not config.inference_mode:
                    warn_user(
                        f"on PEFT's bases this adapter shares those of adapter {name!r}, which are "
                        "larger than its own layers need: its file can be loaded beside that "
                        'adapter, and not alone; basis="hadamard" has no such limit'
                    )
                return A, B
        return None

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        check_mergeable(layers_by_path(self.model))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names=None, **call):
        if adapter_names is None:
            yield
            return
        with adapters_by_row(self, adapter_names, call):
            yield

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in BASIS_NAMES:  # before the layers, which then need not
            getattr(self, name)._save_to_state_dict(destination, f"{prefix}{name}.", keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *others) -> None:
        self._refuse_bases(state_dict, prefix)
        own = self._saved_bases(prefix)
        # Stock PEFT's files hold a copy under every layer, and packing each would take long.
        copied = tuple("." + key.removeprefix(prefix) for key in own if key in state_dict)
        for key in [key for key in state_dict if key.endswith(copied) and key not in own]:
            del state_dict[key]
        missing += [key for key in own if key not in state_dict]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)

    def _saved_bases(self, prefix: str) -> dict[str, Tensor]:
        A, B = (getattr(self, name).saved(f"{prefix}{name}.") for name in BASIS_NAMES)
        return A | B

    def _refuse_bases(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Raises RuntimeError if bases in a state dict have other shapes or dtypes."""
        own = self._saved_bases(prefix)
        given = [key for key in own if key in state_dict]
        misfits = [why for key in given for why in tensor_misfits(key, state_dict[key], own[key])]
        if misfits:
            raise RuntimeError("the bases do not fit:\n\t" + "\n\t".join(misfits))

    @classmethod
    def _get_adapter_state_dict(cls, **kwargs) -> dict:
        found, name = super()._get_adapter_state_dict(**kwargs), kwargs["adapter_name"]
        if description_of_config(kwargs["config"]) is None:  # of a file for stock PEFT
            return {key: found[key] for key in found if f".{RECORD}." not in key}
        # What DeepSpeed's ZeRO-3 gathers from its ranks has parameters and buffers, but no records.
        for path, layer in kwargs["model"].named_modules():
            if not isinstance(layer, AcceleratedLinear) or name not in layer.randlora_record:
                continue
            if f"{path}.randlora_lambda.{name}" in found:
                record = layer.randlora_record[name].get_extra_state()
                found.setdefault(f"{path}.{RECORD}.{name}._extra_state", record)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, **kwargs) -> dict:
        """As PEFT's. Here all tensors of a file are seen before the first one is copied, so here
        they are checked."""
        model, name, named = kwargs["model"], kwargs["adapter_name"], {}
        # PEFT adds the adapter's name only to entries that the model would write itself. A file may
        # hold bases elsewhere, also under every layer.
        own = any(path.startswith(_PREFIX) for path, _ in model.named_parameters())
        for key, tensor in super()._remap_adapter_state_dict_for_load(**kwargs).items():
            if key.endswith(BASIS_NAMES):
                key = f"{key}.{name}"
            # PEFT takes it off later, if adapters were injected into a model.
            named[key if own else key.removeprefix(_PREFIX)] = tensor
        folder = getattr(kwargs["config"], "read_from", None)
        from_folder = f" (its configuration is from {folder})" if folder else ""
        what = f"what is loaded into adapter {name!r}{from_folder}"
        refuse_misfits(layers_by_path(model), named, what)
        check_names(model, name, named, what)
        return named


def layer_class(base_layer: nn.Module) -> type[AcceleratedLinear]:
    """That of a layer with adapters over `base_layer`."""
    return QuantizedLinear if quantized.backend_of(base_layer) else AcceleratedLinear
