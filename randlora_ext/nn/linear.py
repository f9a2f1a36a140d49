"""`RandLoraLinear`: a frozen linear layer with a RandLoRA adapter, in plain torch."""

from typing import Any

import torch
from torch import Tensor, nn

from ..basis import Basis
from ..basis.description import SPECIFICATIONS
from ..checks import check_alpha, check_dropout, check_one_of, warn_user
from .adapted_layer import AdaptedLayer
from .adapter_record import AdapterRecord
from .base_layer import check_base_layer, features, is_conv1d
from .input_scale import InputScales
from .merging import adapter_dtype

# The largest scaling that the authors and PEFT's examples train with.
DEFAULT_SCALING = 20.0
NAME = "default"  # of the adapter, as PEFT calls the first one


def more_than_d(r: int, d: int) -> str:
    return (
        f"r = {r} is more than min(in_features, out_features) = {d}, with which dW has full rank "
        "already: the rest costs time and parameters and adds nothing"
    )


class RandLoraLinear(AdaptedLayer, nn.Module):
    """``base_layer(x) + scaling * dropout(x) @ (B @ A')^T``, if out >= in.

    A' (K, d) is A scaled by lambda and gamma. B @ A' is (out, in), or if in > out its transpose is
    (`randlora_ext.delta_weight`). The layer replaces its base layer, which it freezes and keeps,
    without a copy, as ``base_layer``. x (..., in) -> (..., out) in the base layer's output dtype.

    Args:
        base_layer: nn.Linear or transformers' Conv1D (which stores its weight as (in, out)).
        r: rows of A. More than d = min(in, out) warns.
        randlora_alpha: scaling = randlora_alpha / r. None means 20 r, so a scaling of 20.
        density: as all that follow, of the bases (`Basis`).
        seed: likewise. `RandLoraConfig` with this basis and ``projection_prng_key=seed`` has the
            same bases.
        randlora_dropout: probability in [0, 1) that an input of the adapter is dropped.
        basis: the `kind` of `Basis`.

    Attributes have the names that they have under PEFT, which knows several adapters; the one here
    is called "default": ``randlora_lambda["default"]`` (r, n), initially zero, so a new adapter
    changes nothing; ``randlora_gamma["default"]`` (n, d), initially 1 / max(n, d);
    ``scaling["default"]``; ``bases["default"]`` (`Basis`). While ``disabled`` is True, a layer that
    is not merged computes what its base layer computes.

    Dtypes: lambda and gamma start as float32 (float64 on a float64 base), and ``.to(dtype)`` casts
    them with the base: to train float32 adapters on a 16-bit base, cast it first, then wrap it.
    The operators accumulate in float32 or better. As with nn.Linear, x must have the weight's dtype
    unless autocast is on.

    ``state_dict`` holds the base layer, lambda and gamma, the input scale of an adapter on Hadamard
    bases, and a record of seed, density, r, alpha and sizes in place of the bases.
    ``load_state_dict`` raises RuntimeError, before it copies anything into the layer, if one of
    these or the shape of an adapter's tensor differs, or the adapter is merged.

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
        basis: str | None = None,
    ) -> None:
        super().__init__()
        check_base_layer(base_layer, "base_layer")
        check_dropout(randlora_dropout)
        if basis is not None:
            check_one_of("basis", basis, SPECIFICATIONS)
        self.in_features, self.out_features = features(base_layer)
        self.fan_in_fan_out = is_conv1d(base_layer)
        bases = Basis(self.in_features, self.out_features, r, density, seed, basis).canonical()
        alpha = DEFAULT_SCALING * r if randlora_alpha is None else randlora_alpha
        check_alpha("randlora_alpha", alpha)
        if r > bases.d:
            warn_user(more_than_d(r, bases.d))

        self.r = {NAME: r}
        self.scaling = {NAME: alpha / r}
        self.bases = {NAME: bases}
        self.active_adapters = [NAME]
        self.merged_adapters = []

        self.base_layer = base_layer.requires_grad_(False)
        weight = self._base_weight()
        device, dtype = weight.device, adapter_dtype(weight.dtype)
        lam = torch.zeros(bases.lam_shape, device=device, dtype=dtype)
        first = 1 / max(bases.n, bases.d)
        gam = torch.full(bases.gam_shape, first, device=device, dtype=dtype)
        dropout = nn.Dropout(randlora_dropout) if randlora_dropout else nn.Identity()
        self.randlora_dropout = nn.ModuleDict({NAME: dropout})
        self.randlora_lambda = nn.ParameterDict({NAME: lam})
        self.randlora_gamma = nn.ParameterDict({NAME: gam})
        self.randlora_input_scale = InputScales()
        self._reset_input_scale(NAME, bases.kind == "hadamard")
        assert bases.description is not None  # their seed generates them
        record = AdapterRecord(bases.description, r, alpha, self.in_features, self.out_features)
        self.randlora_record = nn.ModuleDict({NAME: record})
        self._force_module_call()
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return self._output_with_adapters(self._prepare_adapters(), x)

    def _prepare_adapters(self) -> list[str]:
        if self.merged_adapters:
            self._warn_if_trained()
        return [] if self.disabled or self.merged_adapters else [NAME]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False) -> None:
        """Adds dW to the base weight, in place: W + dW, rounded once to W's dtype.

        W is kept in CPU memory, so that `unmerge` restores every bit.

        Args:
            safe_merge: raise instead of writing NaN or inf.

        Raises:
            ValueError: the adapter is merged already, or safe_merge finds NaN or inf. TypeError:
                the weight is not floating point, or is computed at every use (parametrizations,
                pruning). RuntimeError: another layer is merged into the same weight, or that is on
                the meta device or elsewhere (ZeRO-3). After any of these nothing has changed.
        """
        if self.merged:
            raise ValueError("the adapter is merged already; call unmerge() first")
        self._merge([NAME], safe_merge)

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """What PEFT leaves here when it unloads its own adapters, which this one is not."""
        return self

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        if self.merged:
            warn_user(
                f"{prefix}base_layer.weight of this state dict holds the merged adapter; a layer "
                "that loads it with its lambda and gamma adds it twice. Call unmerge() first, or "
                "save base_layer alone"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that reads ``layer.weight``."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]
