"""`RandLoraLinear`: a frozen linear layer with one or more RandLoRA adapters, without PEFT."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..basis import Basis
from ..basis.description import SPECIFICATIONS
from ..checks import (
    check_adapter_name,
    check_alpha,
    check_dropout,
    check_one_of,
    check_parameter_options,
    warn_user,
)
from .adapted_layer import AdaptedLayer
from .base_layer import check_base_layer, features, is_conv1d
from .input_scale import InputScales
from .merging import adapter_dtype

# The largest scaling that the authors and PEFT's examples train with.
DEFAULT_SCALING = 20.0


def more_than_d(r: int, d: int) -> str:
    return (
        f"r = {r} is more than min(in_features, out_features) = {d}, with which dW has full rank "
        "already: the rest costs time and parameters and adds nothing"
    )


class RandLoraLinear(AdaptedLayer, nn.Module):
    """``base_layer(x) + sum over active adapters of scaling * dropout(x) @ (B @ A')^T``.

    A' (K, d) is A scaled by lambda and gamma; B @ A' has the shape of the weight
    (`randlora_ext.delta_weight`). The layer replaces its base layer, which it freezes and keeps,
    without a copy, as ``base_layer``. x (..., in) -> (..., out) in the base layer's output dtype.

    Args:
        base_layer: nn.Linear or transformers' Conv1D (which stores its weight as (in, out)).
        r: rows of A. More than d = min(in, out) warns.
        randlora_alpha: scaling = randlora_alpha / r. None means 20 r, so a scaling of 20.
        randlora_dropout: probability in [0, 1) that an input of the adapter is dropped.
        adapter_name: name of the first adapter; `update_layer` adds more.
        density: as all that follow, of the bases (`Basis`).
        seed: likewise; PEFT draws others from an equal ``projection_prng_key``.
        basis: the `kind` of `Basis`.

    Attributes, each by adapter name: ``randlora_lambda`` (r, n), initially zero, so a new adapter
    changes nothing; ``randlora_gamma`` (n, d), initially 1 / max(n, d); ``scaling``;
    ``r``; ``bases`` (`Basis`). ``active_adapters`` are those whose outputs are added, unless
    the layer is ``disabled``.

    Dtypes: lambda and gamma start as float32 (float64 on a float64 base), and ``.to(dtype)`` casts
    them with the base: to train float32 adapters on a 16-bit base, cast it first, then wrap it.
    The operators accumulate in float32 or better. As with nn.Linear, x must have the weight's dtype
    unless autocast is on.

    ``state_dict`` holds the base layer, lambda and gamma and, of adapters on Hadamard bases, their
    `randlora_input_scale`, but no basis. ``load_state_dict`` raises before it copies anything if
    the state does not fit or an adapter is merged.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.

    Source: PEFT's ``randlora.layer.Linear``, which has the same names.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 32,
        randlora_alpha: float | None = None,
        density: float | None = None,
        seed: int = 0,
        randlora_dropout: float = 0.0,
        adapter_name: str = "default",
        basis: str | None = None,
    ) -> None:
        super().__init__()
        check_base_layer(base_layer, "base_layer")
        self.in_features, self.out_features = features(base_layer)
        self.fan_in_fan_out = is_conv1d(base_layer)
        self._make_empty(base_layer, adapter_name)
        self.update_layer(adapter_name, r, randlora_alpha, density, seed, randlora_dropout, basis)
        self._freeze_base()
        self.train(base_layer.training)

    def _make_empty(self, base_layer: nn.Module, adapter_name: str) -> None:
        """Makes the attributes of a layer whose first adapter is still to come."""
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.bases = {}
        self.merged_adapters = []
        self.active_adapters: list[str] = [adapter_name]
        self.disabled = False
        self.base_layer = base_layer
        self.randlora_dropout = nn.ModuleDict()
        self.randlora_lambda = nn.ParameterDict()
        self.randlora_gamma = nn.ParameterDict()
        self.randlora_input_scale = InputScales()
        self._force_module_call()

    def _freeze_base(self) -> None:
        """Freezes what the layer adapts."""
        self.base_layer.requires_grad_(False)

    def update_layer(
        self,
        adapter_name: str,
        r: int = 32,
        randlora_alpha: float | None = None,
        density: float | None = None,
        seed: int = 0,
        randlora_dropout: float = 0.0,
        basis: str | None = None,
    ) -> None:
        """Adds an adapter, or replaces the one of that name; arguments as for the class.

        An added adapter is neither active nor trained until `set_adapter` names it.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter_name {adapter_name!r} is merged; call unmerge() first")
        check_dropout(randlora_dropout)
        if basis is not None:
            check_one_of("basis", basis, SPECIFICATIONS)
        if self.experts:
            check_parameter_options(self.parameter_name, basis, density, randlora_dropout)
        bases = Basis(self.in_features, self.out_features, r, density, seed, basis).canonical()
        alpha = DEFAULT_SCALING * r if randlora_alpha is None else randlora_alpha
        check_alpha("randlora_alpha", alpha)
        if r > bases.d:
            warn_user(more_than_d(r, bases.d))

        weight = self._base_weight()
        device, dtype = weight.device, adapter_dtype(weight.dtype)
        lam_shape, gam_shape = (*self.experts, *bases.lam_shape), (*self.experts, *bases.gam_shape)
        lam = torch.zeros(lam_shape, device=device, dtype=dtype)
        gam = torch.full(gam_shape, 1 / max(bases.n, bases.d), device=device, dtype=dtype)
        dropout = nn.Dropout(randlora_dropout) if randlora_dropout else nn.Identity()

        self.bases[adapter_name] = bases
        self.r[adapter_name] = r
        self.scaling[adapter_name] = alpha / r
        self.randlora_dropout[adapter_name] = dropout.train(self.training)
        self.randlora_lambda[adapter_name] = nn.Parameter(lam)
        self.randlora_gamma[adapter_name] = nn.Parameter(gam)
        self._reset_input_scale(adapter_name, bases.kind == "hadamard")
        self._mark_trained()

    def set_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Activates these adapters: their outputs are added and they alone are trained.

        Raises ValueError for an unknown or repeated name. A merged adapter stays merged.
        """
        self.active_adapters = self._known_adapters(adapter_names)
        self._mark_trained()

    def disable(self) -> None:
        """Turns all adapters off until `enable`, and unmerges merged ones."""
        if self.merged:
            self.unmerge()
        self.disabled = True
        self._mark_trained()

    def enable(self) -> None:
        """Undoes `disable`: the active adapters are added and trained again."""
        self.disabled = False
        self._mark_trained()

    def _mark_trained(self) -> None:
        for diagonals in (self.randlora_lambda, self.randlora_gamma):
            for name, parameter in diagonals.items():
                parameter.requires_grad_(name in self.active_adapters and not self.disabled)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_adapters:
            self._warn_if_trained()
        return self._output_with_adapters(self._adapters_to_add(), x)

    def _adapters_to_add(self) -> list[str]:
        active = [] if self.disabled else self.active_adapters
        return [name for name in active if name not in self.merged_adapters]

    @torch.no_grad()
    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
        keep_weight: str = "host",
    ) -> None:
        """Adds the adapters' dW to the base weight, in place: W + dW, rounded once to W's dtype.

        Args:
            safe_merge: raise instead of writing NaN or inf.
            adapter_names: the adapters to merge; None means the active ones.
            keep_weight: where W is kept, so that `unmerge` restores every bit: "host" is CPU
                memory, "device" the weight's own device. An adapter that changes no bit of W
                keeps nothing. With "nothing" `unmerge` subtracts dW.

        Raises:
            ValueError: an argument is wrong, an adapter is merged already, or safe_merge finds NaN
                or inf. TypeError: the weight is not floating point, or is computed at every use
                (parametrizations, pruning). RuntimeError: the layer is disabled, another layer is
                merged into the same weight, or that is on the meta device or elsewhere (ZeRO-3).
                After any of these nothing has changed.
        """
        names = self._known_adapters(
            self.active_adapters if adapter_names is None else adapter_names
        )
        for name in names:
            if name in self.merged_adapters:
                raise ValueError(f"adapter_names: {name!r} is merged already; unmerge() first")
        if self.disabled:
            raise RuntimeError("merge() on a disabled layer; call enable() first")
        self._merge(names, safe_merge, keep_weight)

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        if self.merged:
            warnings.warn(
                f"{prefix}base_layer.weight of this state dict holds the merged adapters "
                f"{self.merged_adapters}; a layer that loads it with their lambda and gamma adds "
                "them twice. Call unmerge() first, or merge_and_unload() for weights alone",
                stacklevel=2,
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that reads ``layer.weight``."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def _known_adapters(self, names: str | Sequence[str]) -> list[str]:
        """These names as a list; ValueError for an unknown or repeated one."""
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            check_one_of("adapter_names", name, self.randlora_lambda)
        if len(set(names)) != len(names):
            raise ValueError(f"adapter_names must not repeat a name, got {names}")
        return names
