"""PEFT's RandLoRA model that makes accelerated layers over packed bases of any density."""

import math
from collections.abc import Hashable
from contextlib import contextmanager, nullcontext

import peft
import torch
from peft.tuners.randlora.layer import Linear, RandLoraLayer
from peft.tuners.randlora.model import RandLoraModel
from torch import nn

from ..basis import BasisDescription
from ..nn.base_layer import disable_nested_tensors, force_module_call
from .bases import BASES, PackedBases
from .checkpoint import check_fit, drop_copies
from .layer import Accelerated, accelerated_class, update_quantized
from .mixed import adapter_per_row
from .ternary_tensor import TernaryMatrix, TernaryTensor

_UPCAST = (torch.float16, torch.bfloat16)


class AcceleratedRandLoraModel(RandLoraModel):
    """What `randlora_ext.peft.enable` puts in the place of ``peft.RandLoraModel``.

    What differs beside the layers' class: bases are packed as soon as they are drawn; a config's
    ``density`` and ``basis``; an added adapter whose r or density is not that of the first, or
    whose layers are larger, draws bases of its own (stock PEFT would take the first adapter's and
    fail), which are those it would have alone; a second adapter on quantized layers; a file is
    checked before anything of it is taken; and ``adapter_names`` in a forward call.
    """

    @staticmethod
    def _create_new_module(*args, **kwargs) -> nn.Module:
        return accelerate_layer(RandLoraModel._create_new_module(*args, **kwargs))

    def _pre_injection_hook(
        self, model: nn.Module, config: peft.RandLoraConfig, adapter_name: str
    ) -> None:
        if isinstance(config.projection_prng_key, str):
            raise ValueError(
                f"projection_prng_key is {config.projection_prng_key!r}, of bases that "
                "randlora_ext generates: read or make this configuration after "
                "randlora_ext.peft.enable(), which knows them"
            )
        if getattr(config, "basis", "peft") != "peft":
            self._describe_bases(config, adapter_name)
            return
        density = getattr(config, "density", None)
        if density is None:
            super()._pre_injection_hook(model, config, adapter_name)
        else:
            self._init_randlora_A_randlora_B_sparse(config, adapter_name, sparsity=1 / density)
            for name in BASES:
                basis = getattr(self, name)[adapter_name]
                if not bool(basis.isfinite().all()):  # PEFT divides by the standard deviation, 0
                    raise ValueError(
                        f"density={density} leaves no non-zero in {name} {tuple(basis.shape)}; it "
                        f"must be well above 1 / {basis.numel()}"
                    )
        pack_model(self)

    def _describe_bases(self, config: peft.RandLoraConfig, adapter_name: str) -> None:
        """``basis="independent"``: nothing is drawn; layers generate their slice from the key."""
        out_features, in_features = self._find_dim(config)
        D, d = max(out_features, in_features), min(out_features, in_features)
        n, r, key = -(-d // config.r), config.r, config.projection_prng_key
        generated = BasisDescription(config.basis, generated_density(config, d), key)
        value, device = 1 / math.sqrt(generated.density), torch.device("cpu")
        # Kept out of state dicts whatever save_projection says: key and version are the basis.
        self.randlora_A = PackedBases(persistent=False)
        self.randlora_B = PackedBases(persistent=False)
        for bases, role, shape in (
            (self.randlora_A, 0, (r, 1, d)),
            (self.randlora_B, 1, (D, n, r)),
        ):
            cols = shape[1] * shape[2]
            matrix = TernaryMatrix(shape[0], cols, value, None, generated, role)
            bases[adapter_name] = TernaryTensor(matrix, shape, torch.float32, device)

    def _find_dim(self, config: peft.RandLoraConfig) -> tuple[int, int]:
        """(largest out_features, largest in_features) of the targets.

        PEFT's looks at nn.Linear and Conv1D; an added adapter meets them wrapped, and a wrapped
        quantized layer is neither.
        """
        # Where the user left the targets to PEFT.
        config = self._prepare_adapter_config(config, self.get_model_config(self.model))
        wrapped = [
            (module.out_features, module.in_features)
            for name, module in self.model.named_modules()
            if isinstance(module, RandLoraLayer) and self._check_target_module_exists(config, name)
        ]
        try:
            wrapped.append(super()._find_dim(config))
        except ValueError:
            if not wrapped:
                raise
        out_features, in_features = (max(sizes) for sizes in zip(*wrapped, strict=True))
        return out_features, in_features

    def _create_and_replace(
        self,
        randlora_config: peft.RandLoraConfig,
        adapter_name: str,
        target: nn.Module,
        *args,
        **kwargs,
    ) -> None:
        if adapter_name not in self.randlora_A:
            self._add_bases(randlora_config, adapter_name)
        if isinstance(target, Accelerated) and not isinstance(target, Linear):
            # PEFT would put a second layer around a quantized one.
            update_quantized(
                target, adapter_name, self.randlora_A, self.randlora_B, randlora_config
            )
        else:
            super()._create_and_replace(randlora_config, adapter_name, target, *args, **kwargs)
        disable_nested_tensors(self.model, kwargs["current_key"])

    def _add_bases(self, config: peft.RandLoraConfig, adapter_name: str) -> None:
        """Finds or draws the bases of an added adapter, unless stock PEFT does the same."""
        A, B = self.randlora_A, self.randlora_B
        out_features, in_features = self._find_dim(config)
        D, d = max(out_features, in_features), min(out_features, in_features)
        alike = [name for name in A if _recipe(self.peft_config[name]) == _recipe(config)]
        first = next(iter(A), None)
        if (
            first is not None
            and first in alike
            and A[first].shape[-1] >= d
            and B[first].shape[0] >= D
        ):
            return  # PEFT lets all adapters share the first one's
        for name in alike:
            if A[name].shape[-1] == d and B[name].shape[0] == D:
                A[adapter_name], B[adapter_name] = A[name], B[name]
                return
        try:  # the hook starts new dictionaries
            self._pre_injection_hook(self.model, config, adapter_name)
            drawn = self.randlora_A[adapter_name], self.randlora_B[adapter_name]
        finally:
            self.randlora_A, self.randlora_B = A, B
        A[adapter_name], B[adapter_name] = drawn

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's to float32, which does not find the bases: layers only refer to them."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for bases in (self.randlora_A, self.randlora_B):
            if autocast_adapter_dtype and bases[adapter_name].dtype in _UPCAST:
                bases[adapter_name] = bases[adapter_name].float()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """PEFT's seam for ``model(..., adapter_names=[...])``."""
        names = kwargs.pop("adapter_names", None)
        with nullcontext() if names is None else adapter_per_row(self, names, kwargs):
            yield

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in BASES:  # before the layers, which then need not
            getattr(self, name)._save_to_state_dict(destination, f"{prefix}{name}.", keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        check_fit(self, state_dict, prefix)
        drop_copies(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict) -> dict:
        # Newer PEFT names the entries that the model would write itself; a file may hold bases
        # elsewhere: under every layer, or under the layers alone.
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return {
            f"{key}.{adapter_name}" if key.endswith(BASES) else key: value
            for key, value in remapped.items()
        }


def accelerate_layer(layer: nn.Module) -> nn.Module:
    """Gives a RandLoRA layer of PEFT its accelerated class, in place."""
    accelerated = accelerated_class(type(layer))
    if accelerated is not None:
        layer.__class__ = accelerated
        layer.randlora_A, layer.randlora_B = layer.randlora_A, layer.randlora_B  # as it keeps them
        force_module_call(layer)
    return layer


def pack_model(model: RandLoraModel) -> None:
    """Puts packed dictionaries in the place of PEFT's dense ones."""
    for name in BASES:
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
    ours = ("density", None), ("basis", "peft")
    return config.r, *(getattr(config, name, default) for name, default in ours)
