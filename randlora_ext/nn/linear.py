"""`RandLoraLinear`: a frozen linear layer with one or more RandLoRA adapters, without PEFT."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..basis import TernaryBasis
from ..basis.description import check_kind, check_seed
from ..ops import functional
from ..ops.dtensor import full_tensor
from ..ops.path import explain
from .base_layer import can_fuse, check_base_layer, features, force_module_call, is_conv1d
from .merging import Mergeable, adapter_dtype
from .state_dict import refuse_misfit

_REPR_TOKENS = 512  # `extra_repr` shows the path for this many tokens

# The largest scaling that the authors and PEFT's examples train with.
DEFAULT_SCALING = 20.0


class RandLoraLinear(Mergeable, nn.Module):
    """``base_layer(x) + sum over active adapters of scaling * dropout(x) @ (B @ A')^T``.

    A' (K, d) is A scaled by lambda and gamma; B @ A' has the shape of the weight
    (`randlora_ext.delta_weight`). The layer replaces its base layer, which it freezes and keeps,
    without a copy, as ``base_layer``. x (..., in) -> (..., out) in the base layer's output dtype.

    Args:
        base_layer: nn.Linear or transformers' Conv1D (which stores its weight as (in, out)).
        r: rank of one base, at most 65,536; n = ceil(d / r).
        randlora_alpha: scaling = randlora_alpha / r. None means 20 r, so a scaling of 20.
        density: share of non-zeros in independent bases, in (0, 1]. None means 1/3, PEFT's
            ``sparse``. Hadamard bases take none.
        projection_prng_key: seed of the bases, 0 <= key < 2**64. They follow docs/basis-spec.md;
            PEFT draws other bases from the same key.
        randlora_dropout: probability in [0, 1) that an input of the adapter is dropped.
        adapter_name: name of the first adapter; `update_layer` adds more.
        basis: kind of the bases, "independent" or "hadamard"; see `TernaryBasis`.

    Attributes, each by adapter name: ``randlora_lambda`` (r, n), initially zero, so a new adapter
    changes nothing; ``randlora_gamma`` (n, d), initially 1 / max(n, d); ``num_bases`` (n);
    ``scaling``; ``r``; ``bases`` (`TernaryBasis`).

    Dtypes: lambda and gamma start as float32 (float64 on a float64 base). ``.to(dtype)`` and
    ``.half()`` cast them with the base like any parameter. To train float32 adapters on a 16-bit
    base, cast the base first, then wrap it. Any combination works; the operators accumulate in
    float32 or better. As with nn.Linear, x must have the weight's dtype unless autocast is on.

    ``state_dict`` holds the base layer, lambda and gamma, but no basis. ``load_state_dict`` raises
    before it copies anything if the state does not fit or an adapter is merged.

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
        projection_prng_key: int = 0,
        randlora_dropout: float = 0.0,
        adapter_name: str = "default",
        basis: str = "independent",
    ) -> None:
        super().__init__()
        check_base_layer(base_layer, "base_layer")
        self.in_features, self.out_features = features(base_layer)
        self.fan_in_fan_out = is_conv1d(base_layer)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.num_bases: dict[str, int] = {}
        self.bases: dict[str, TernaryBasis] = {}
        self.merged_adapters = []
        self._active: list[str] = [adapter_name]
        self._disabled = False
        self.base_layer: Any = base_layer
        self.randlora_dropout = nn.ModuleDict()
        self.randlora_lambda = nn.ParameterDict()
        self.randlora_gamma = nn.ParameterDict()
        options = randlora_alpha, density, projection_prng_key, randlora_dropout, basis
        self.update_layer(adapter_name, r, *options)
        base_layer.requires_grad_(False)
        self.train(base_layer.training)
        self.register_load_state_dict_pre_hook(refuse_misfit)
        force_module_call(self)

    def update_layer(
        self,
        adapter_name: str,
        r: int = 32,
        randlora_alpha: float | None = None,
        density: float | None = None,
        projection_prng_key: int = 0,
        randlora_dropout: float = 0.0,
        basis: str = "independent",
    ) -> None:
        """Adds an adapter, or replaces the one of that name; arguments as for the class.

        An added adapter is neither active nor trained until `set_adapter` names it.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter_name {adapter_name!r} is merged; call unmerge() first")
        _check_options(randlora_alpha, projection_prng_key, randlora_dropout)
        check_kind("basis", basis)
        bases = self._new_basis(r, density, projection_prng_key, basis)

        weight = self.base_layer.weight
        device, dtype = weight.device, adapter_dtype(weight.dtype)
        lam = torch.zeros(bases.r, bases.n, device=device, dtype=dtype)
        gam = torch.full((bases.n, bases.d), 1 / max(bases.n, bases.d), device=device, dtype=dtype)
        dropout = nn.Dropout(randlora_dropout) if randlora_dropout else nn.Identity()

        self.bases[adapter_name] = bases
        self.r[adapter_name] = r
        self.num_bases[adapter_name] = bases.n
        alpha = DEFAULT_SCALING * r if randlora_alpha is None else randlora_alpha
        self.scaling[adapter_name] = alpha / r
        self.randlora_dropout[adapter_name] = dropout.train(self.training)
        self.randlora_lambda[adapter_name] = nn.Parameter(lam)
        self.randlora_gamma[adapter_name] = nn.Parameter(gam)
        self._mark_trained()

    def _new_basis(self, *description) -> TernaryBasis:
        return TernaryBasis(self.in_features, self.out_features, *description).canonical()

    # ---- active adapters ---------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters whose outputs are added."""
        return list(self._active)

    @property
    def disabled(self) -> bool:
        return self._disabled

    def set_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Activates these adapters: their outputs are added and they alone are trained.

        Raises ValueError for an unknown or repeated name. A merged adapter stays merged.
        """
        self._active = self._check_names("adapter_names", adapter_names)
        self._mark_trained()

    def disable(self) -> None:
        """Turns all adapters off until `enable`, and unmerges merged ones."""
        if self.merged:
            self.unmerge()
        self._disabled = True
        self._mark_trained()

    def enable(self) -> None:
        """Undoes `disable`: the active adapters are added and trained again."""
        self._disabled = False
        self._mark_trained()

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """Lambda and gamma of all adapters, active or not."""
        yield from self.randlora_lambda.values()
        yield from self.randlora_gamma.values()

    def _mark_trained(self) -> None:
        for diagonals in (self.randlora_lambda, self.randlora_gamma):
            for name, parameter in diagonals.items():
                parameter.requires_grad_(name in self._active and not self._disabled)

    # ---- the computation ---------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        names = [] if self._disabled else [a for a in self._active if a not in self.merged_adapters]
        base = self.base_layer
        if len(names) == 1 and not self._drops(names[0]) and self._can_fuse(x):
            return self._part(names[0], x, base.weight, base.bias)
        y = base(x)
        for name in names:
            y = y + self._part(name, self.randlora_dropout[name](x), None, None)
        return y

    def _can_fuse(self, x: Tensor) -> bool:
        return can_fuse(self.base_layer, x)

    def _drops(self, name: str) -> bool:
        dropout = self.randlora_dropout[name]
        return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0

    def _part(self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        lam, gam = self.randlora_lambda[name], self.randlora_gamma[name]
        return self._linear(name, x, weight, bias, lam, gam)

    def _linear(
        self,
        name: str,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lam: Tensor,
        gam: Tensor,
    ) -> Tensor:
        return functional.linear(x, weight, bias, self.bases[name], lam, gam, self.scaling[name])

    def get_scaled_bases(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The dense factors (P, Q) of ``scaling * F.linear(F.linear(x, P), Q)``, the adapter.

        They are (A', B) if d == in, otherwise (B^T, A'^T), in the dtype of lambda. For study and
        export; forward forms neither. Source: PEFT's method.
        """
        self._check_names("adapter", adapter)
        lam, gam = self._diagonals(adapter)
        basis = self.bases[adapter]
        scaled = functional.scaled_basis(basis, lam, gam)
        B = basis.dense(lam.device, lam.dtype)[1]
        return (scaled, B) if basis.expand else (B.T, scaled.T)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``scaling * B @ A'`` in the shape of the base layer's weight and the dtype of lambda.

        Differentiable for lambda and gamma. Raises ValueError for an unknown adapter.
        """
        self._check_names("adapter", adapter)
        return self._delta(adapter, self.randlora_lambda[adapter].dtype)

    def _delta(self, name: str, dtype: torch.dtype) -> Tensor:
        lam, gam = (t.to(dtype) for t in self._diagonals(name))
        delta = functional.delta_weight(self.bases[name], lam, gam, self.scaling[name])
        return delta.T if self.fan_in_fan_out else delta

    def _diagonals(self, name: str) -> tuple[Tensor, Tensor]:
        """Lambda and gamma, gathered if FSDP2 has sharded them."""
        return full_tensor(self.randlora_lambda[name]), full_tensor(self.randlora_gamma[name])

    # ---- conveniences ------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that reads ``layer.weight``."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def _check_names(self, argument: str, names: str | Sequence[str]) -> list[str]:
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self.bases:
                raise ValueError(f"{argument}: unknown adapter {name!r}; known are {[*self.bases]}")
        if len(set(names)) != len(names):
            raise ValueError(f"{argument} must not repeat a name, got {names}")
        return names

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, out_features={self.out_features}"]
        for name, basis in self.bases.items():
            dropout = self.randlora_dropout[name]
            weight = self.base_layer.weight
            p = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
            plain = type(self.base_layer) is nn.Linear
            path = explain(basis, _REPR_TOKENS, weight.dtype, weight.device, plain, p).path
            state = "merged" if name in self.merged_adapters else "inactive"
            if name in self._active and name not in self.merged_adapters:
                state = "disabled" if self._disabled else "active"
            kind = "hadamard" if basis.kind == "hadamard" else f"density={basis.density:.4g}"
            parts.append(
                f"{name}: r={basis.r}, {kind}, {state}, path {path} at {_REPR_TOKENS} tokens"
            )
        return "; ".join(parts)


def check_adapter_name(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"adapter_name must be a string, got {name!r}")
    # nn.ModuleDict and nn.ParameterDict keep their entries as attributes.
    taken = hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name)
    if not name or "." in name or taken:
        raise ValueError(
            f"adapter_name must be non-empty, without '.', and no attribute of nn.ModuleDict or "
            f"nn.ParameterDict, got {name!r}"
        )


def check_alpha(name: str, alpha: float) -> None:
    """Raises TypeError or ValueError, naming `name`, unless `alpha` is a finite number."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"{name} must be a finite number, got {alpha!r}")
    if not abs(alpha) <= sys.float_info.max:  # an int may be larger than any float
        shown = alpha if isinstance(alpha, float) else f"an integer of {alpha.bit_length()} bits"
        raise ValueError(f"{name} must be a finite number, got {shown}")


def _check_options(alpha: float | None, key: int, dropout: float) -> None:
    if alpha is not None:
        check_alpha("randlora_alpha", alpha)
    check_seed("projection_prng_key", key)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"randlora_dropout must be a number in [0, 1), got {dropout!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"randlora_dropout must be in [0, 1), got {dropout}")
