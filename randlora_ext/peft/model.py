"""PEFT's RandLoRA model with accelerated layers over packed bases, of every kind and density."""

import sys
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import peft
import torch
from peft.tuners.randlora.layer import RandLoraLayer
from peft.tuners.randlora.model import RandLoraModel
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..checks import at_most_ten, check_alpha, check_r, meant_targets, warn_of_unmatched, warn_user
from ..nn.adapter_record import RECORD
from ..nn.apply import check_not_nested
from ..nn.base_layer import (
    check_is_called,
    check_no_plan,
    check_whole,
    disable_nested_tensors,
    features,
    is_conv1d,
)
from ..nn.experts import matching_parameters, sizes_of
from ..nn.linear import DEFAULT_SCALING, RandLoraLinear, more_than_d
from ..nn.merging import check_mergeable, warn_of_shared
from ..nn.state_dict import guard, refuse, tensor_misfits
from ..nn.uncalibrated import warn_when_trained
from . import quantized
from .bases import BASIS_NAMES, PackedBufferDict, description_of_matrix, largest, new_bases
from .config import description_of_config, target_parameters
from .layer import AcceleratedLinear, ParamWrapper, warn_of_misfits
from .quantized import QuantizedLinear
from .saving import refuse_lora_files

# PEFT adds these names to ``modules_to_save`` of classifiers, of which each has one.
_SAVED_ANYWAY = {"classifier", "score", "qa_outputs"}


class AcceleratedRandLoraModel(RandLoraModel):
    """What `enable` puts in the place of ``peft.RandLoraModel``; docs/peft.md says what differs."""

    peft_config: dict[str, Any]
    # (D, d), which `_prepare_model` finds and the adapter's first `_create_and_replace` uses up;
    # PEFT passes nothing from one to the other.
    _sizes_of_bases_to_make: tuple[int, int] | None = None

    @staticmethod
    def _create_new_module(config, A, B, adapter_name, target, **kwargs) -> nn.Module:
        if not _is_linear(target):
            raise ValueError(
                f"Target module {target} is not supported: it is no nn.Linear, no Conv1D of "
                "transformers and no quantized linear layer"
            )
        stored_transposed = is_conv1d(target)
        if config.fan_in_fan_out != stored_transposed:
            warn_user(
                f"fan_in_fan_out is set to {config.fan_in_fan_out}, and must be "
                f"{stored_transposed} for a {type(target).__name__}. It is set to that."
            )
            config.fan_in_fan_out = stored_transposed
        make = layer_class(target)
        return make(target, A, B, adapter_name, config, features(target))

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # PEFT would also set the weight of what it unloads, which not every base layer has.
        setattr(parent, child_name, new_module)

    def _check_new_adapter_config(self, config: peft.RandLoraConfig) -> None:
        """Also PEFT's, of one key and ``save_projection`` among adapters on PEFT's bases alone."""
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
        parameters = target_parameters(config)
        for name, other in self.peft_config.items():
            others = target_parameters(other)
            if parameters and others and others != parameters:
                raise ValueError(
                    f"target_parameters must be {others}, those of adapter {name!r}, got "
                    f"{parameters}: the names of saved tensors depend on the order of nested layers"
                )
        BaseTuner._check_new_adapter_config(self, config)
        if description_of_config(config) is None:
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
        guard(self.model)
        warn_when_trained(self.model, adapter_name)
        if adapter_name == "ref":
            self._copy_for_trl()

    def _copy_for_trl(self) -> None:
        """Copies "default" into "ref", which TRL has added as the reference.

        DPO, KTO, GRPO and RLOO add it with the very configuration of "default", and then copy every
        parameter whose name contains ".default.". Names of RandLoRA *end* in ".default", so the
        reference would silently be the base model (docs/trl.md). Here every parameter and buffer
        of the adapter is copied. If a mended version copies them, too, they are the same.
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
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if not autocast_adapter_dtype:  # low_cpu_mem_usage=True has taken the dtypes of a file
            for layer in self.modules():
                if isinstance(layer, AcceleratedLinear) and adapter_name in layer.randlora_lambda:
                    layer.cast_like_base(adapter_name)

    def _pre_injection_hook(self, model, config, adapter_name) -> None:
        # A second inject_adapter_in_model finds the first one's layers.
        layer = next((m for m in model.modules() if isinstance(m, AcceleratedLinear)), None)
        for name in BASIS_NAMES:
            setattr(self, name, PackedBufferDict() if layer is None else getattr(layer, name))

    def _create_and_replace(
        self, config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if self._sizes_of_bases_to_make is not None:  # this is the adapter's first layer
            D, d = self._sizes_of_bases_to_make
            self._sizes_of_bases_to_make = None
            self._add_bases(config, adapter_name, D, d)
            refuse_lora_files(self.model)
        if parameter_name is not None:
            self._adapt_parameter(config, adapter_name, target, target_name, parent, parameter_name)
        else:
            try:
                check_is_called(self.model, current_key, f"module {current_key!r}")
            except ValueError as error:  # not raised: files of stock PEFT must load
                warn_user(str(error))
            super()._create_and_replace(
                config, adapter_name, target, target_name, parent, current_key
            )
            disable_nested_tensors(self.model, current_key)
        getattr(parent, target_name).path = current_key

    def _adapt_parameter(
        self, config, adapter_name, target, target_name, parent, parameter_name
    ) -> None:
        A, B = self.randlora_A, self.randlora_B
        if isinstance(target, ParamWrapper) and target.parameter_name == parameter_name:
            target.update_layer(adapter_name, A, B, config.r, config=config)
        else:
            wrapper = ParamWrapper(target, parameter_name, A, B, adapter_name, config)
            setattr(parent, target_name, wrapper)

    def _prepare_adapter_config(self, config, model_config):
        # As PEFT's LoRA: the model's usual modules, or none of a model that PEFT does not know.
        if config.target_modules is None and target_parameters(config):
            if model_config.get("model_type") not in self.target_module_mapping:
                return config
        return super()._prepare_adapter_config(config, model_config)

    def _prepare_model(self, config, model) -> None:
        """Checks the targets before anything is drawn or replaced."""
        parameters = self._parameter_sizes(config)
        config = _maybe_include_all_linear_layers(config, model)
        targets = {
            name: module
            for name, module in model.named_modules()
            if self._check_target_module_exists(config, name) and _is_linear(module)
        }
        if not targets and (config.target_modules or not parameters):
            names = [name for name, module in model.named_modules() if _is_linear(module)]
            linear = [name for name in names if not name.endswith(".base_layer")]
            raise ValueError(
                f"target_modules {config.target_modules!r} matches no linear layer of "
                f"{type(model).__name__}{meant_targets(config.target_modules, linear)}; its linear "
                f"layers are called {at_most_ten(linear)}"
            )
        _warn_of_unmatched(config, model, parameters)
        if parameters:
            config.target_parameters = _in_order_of(parameters, config.target_parameters)
        for name, module in targets.items():
            check_no_plan(model, name, f"target {name!r}")
            if not isinstance(module, RandLoraLayer):
                check_whole(getattr(module, "weight", None), f"target {name!r}")
            # PEFT leaves out what lies inside its own layers.
            if isinstance(model.get_submodule(name.rpartition(".")[0]), RandLoraLinear):
                check_not_nested(model, name, f"target {name!r}")
        D, d = largest([*map(features, targets.values()), *parameters.values()])
        if config.r > d:
            warn_user(more_than_d(config.r, d))
        self._sizes_of_bases_to_make = D, d

    def _add_bases(self, config: peft.RandLoraConfig, adapter_name: str, D: int, d: int) -> None:
        """Takes another adapter's, as stock PEFT does, or makes new ones."""
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
            fits = A.shape[-1] == d and B.shape[0] == D
            if name == known[0]:
                fits = A.shape[-1] >= d and B.shape[0] >= D
            if fits:
                return A, B
        return None

    def _parameter_sizes(self, config: peft.RandLoraConfig) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of the ``target_parameters`` by their names."""
        targets = matching_parameters(self.model, target_parameters(config))
        found = {}
        for name, place in targets.items():  # PEFT would look for it in the wrong place
            if ".base_layer" in name:  # the user's own, since `name` is of the base model
                raise ValueError(
                    f"target_parameters: {name!r} lies in a module called 'base_layer', a name "
                    "that PEFT takes for its own and leaves out; apply_randlora takes it"
                )
            modules = [other.module for other in targets.values()]
            above = [module for module in modules if place.module.startswith(f"{module}.")]
            if above:
                raise ValueError(
                    f"target_parameters: {name!r} lies inside {above[0]!r}, of which a parameter "
                    "is a target, too; apply_randlora takes both"
                )
            sizes = sizes_of(self.model.get_submodule(place.module), place.name)
            found[name] = sizes.in_features, sizes.out_features
        return found

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        modules = self.model.named_modules(remove_duplicate=False)
        layers = {path: m for path, m in modules if isinstance(m, AcceleratedLinear)}
        check_mergeable(layers)
        warn_of_shared(self.model, layers)

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        guard(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names=None, **call):
        """For ``model(..., adapter_names=[...])``: row b is computed with adapter_names[b].

        "__base__" means none. `call` has the keyword arguments of the model's call: ``generate``
        repeats every input max(num_beams, num_return_sequences) times, but not in the encoder of a
        T5. Raises ValueError before anything is computed.
        """
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names cannot be given in training mode; call model.eval()")
        take_names = AcceleratedLinear, AuxiliaryTrainingWrapper
        modules = [module for module in self.modules() if isinstance(module, take_names)]
        if any(isinstance(m, ParamWrapper) for m in modules):
            raise ValueError(
                "adapter_names cannot choose among adapters of target_parameters: one W + dW "
                "serves the whole batch"
            )
        known = {name for m in modules for name in getattr(m, "randlora_lambda", ())}
        unknown = sorted(set(adapter_names) - known - {"__base__"})
        if unknown:
            raise ValueError(f"adapter_names has unknown {unknown}; known are {sorted(known)}")
        config = call.get("generation_config")
        counted = "num_beams", "num_return_sequences"
        copies = max(call.get(name, getattr(config, name, None)) or 1 for name in counted)

        def give_names(module, args, kwargs):
            inputs = args[0] if args else next(iter(kwargs.values()))
            times = copies if len(inputs) == copies * len(adapter_names) else 1
            each = [name for name in adapter_names for _ in range(times)]
            if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT's, which wants all adapters
                each = [name if name in module._adapters else "__base__" for name in each]
            return args, {**kwargs, "adapter_names": each}

        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(module.register_forward_pre_hook(give_names, with_kwargs=True))
            yield

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in BASIS_NAMES:  # before the layers, which then need not
            getattr(self, name)._save_to_state_dict(destination, f"{prefix}{name}.", keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *others) -> None:
        A, B = (getattr(self, name).saved(f"{prefix}{name}.") for name in BASIS_NAMES)
        own = A | B
        misfits = []
        for key in own:
            if key in state_dict:
                misfits += tensor_misfits(key, state_dict[key], own[key])
        refuse(misfits, "the state dict", f"the {type(self).__name__}", RuntimeError)
        # Stock PEFT's files hold a copy under every layer, and packing each would take long.
        copied = tuple("." + key.removeprefix(prefix) for key in own if key in state_dict)
        for key in [key for key in state_dict if key.endswith(copied) and key not in own]:
            del state_dict[key]
        missing += [key for key in own if key not in state_dict]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)

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
        # PEFT adds the adapter's name only to entries that the model would write itself. A file may
        # hold bases elsewhere, also under every layer.
        name, named = kwargs["adapter_name"], {}
        for key, tensor in super()._remap_adapter_state_dict_for_load(**kwargs).items():
            if key.endswith(BASIS_NAMES):
                key = f"{key}.{name}"
            named[key] = tensor
        warn_of_misfits(kwargs["model"], name, named)
        return named


def layer_class(base_layer: nn.Module) -> type[AcceleratedLinear]:
    """That of a layer with adapters over `base_layer`."""
    return QuantizedLinear if quantized.backend_of(base_layer) else AcceleratedLinear


def _warn_of_unmatched(
    config: peft.RandLoraConfig, model: nn.Module, parameters: Iterable[str]
) -> None:
    """Warns of names in the configuration that match nothing in the model."""
    module_of = f"module of {type(model).__name__}"
    parameter_of = f"parameter of {type(model).__name__}"
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    warn_of_unmatched("target_modules", config.target_modules, modules, module_of)
    named = target_parameters(config)
    warn_of_unmatched("target_parameters", named, parameters, parameter_of)
    saved = set(config.modules_to_save or ()) - _SAVED_ANYWAY
    # PEFT looks for these without a dot before them.
    saved = {name for name in saved if not any(path.endswith(name) for path in modules)}
    warn_of_unmatched("modules_to_save", saved, modules, module_of)


def _in_order_of(parameters: Iterable[str], targets: Iterable[str]) -> list[str]:
    """``target_parameters`` in the order of what they match, which is that of nesting, innermost
    first: `randlora merge` reads it. What matches nothing comes last."""
    names, ordered = dict.fromkeys(targets), []
    for parameter in parameters:
        for name in names:
            if f".{parameter}".endswith(f".{name}") and name not in ordered:
                ordered.append(name)
    return ordered + [name for name in names if name not in ordered]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module) or bool(quantized.backend_of(module))
