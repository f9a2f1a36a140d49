"""Loading the model, attaching the RandLoRA adapter, saving and reloading it.

``describe_kernels`` and ``_randlora_config`` are the only places that touch randlora_ext itself:
the adapter goes through PEFT, which ``randlora_ext.peft.enable()`` puts on the compiled kernels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .assets import ModelSource
from .errors import DemoError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BACKENDS = ("randlora_ext", "stock")
_ALPHA_PER_RANK = 20  # the ratio that PEFT's documentation recommends


@dataclass(frozen=True)
class AdapterOptions:
    """What defines the adapter; the bases follow from ``seed``, so none of them is ever saved."""

    rank: int
    density: float
    seed: int
    target_modules: Sequence[str]
    backend: str = "randlora_ext"


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; it must know an end-of-text token, which ends every answer."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, source)
    if tokenizer.eos_token_id is None:
        raise DemoError(f"--model {source}: its tokenizer has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base_model(source: ModelSource, device: torch.device) -> PreTrainedModel:
    """A fresh fp32 copy of the base model."""
    from transformers import AutoModelForCausalLM

    return _from_pretrained(AutoModelForCausalLM, source).to(device, torch.float32)


def attach_adapter(model: PreTrainedModel, options: AdapterOptions) -> PeftModel:
    """Wrap ``model`` with a fresh adapter, which changes no output until it is trained."""
    from peft import get_peft_model

    try:
        with _quiet_about_projections():
            return get_peft_model(model, _randlora_config(options))
    except ValueError as error:
        raise DemoError(f"cannot attach the adapter: {_first_line(error)}") from error


def save_adapter(model: PeftModel, folder: Path) -> int:
    """Save the adapter and return the size in bytes of its weights file."""
    # "auto" would ask the hub whether the embeddings were resized.
    model.save_pretrained(folder, save_embedding_layers=False)
    return (folder / "adapter_model.safetensors").stat().st_size


def reload_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter in ``folder`` on a fresh base model, as a user of the file would."""
    from peft import PeftModel

    with _quiet_about_projections():
        return PeftModel.from_pretrained(base, folder)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trained, all) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def describe_kernels(model: PeftModel, tokens: int) -> list[str]:
    """Lines that tell which code computed the adapter for batches of ``tokens`` tokens, and how
    that code was built."""
    import randlora_ext.peft

    build = ", ".join(f"{key} {value}" for key, value in randlora_ext.build_info().items())
    return [randlora_ext.peft.kernel_summary(model, tokens), f"randlora_ext: {build}"]


def _randlora_config(options: AdapterOptions) -> Any:
    import randlora_ext.peft

    density: dict[str, Any] = {"density": options.density}
    if options.backend == "stock":
        randlora_ext.peft.disable()
        if abs(options.density - 1 / 3) > 1e-6:
            raise DemoError(
                f"--density {options.density:g}: stock PEFT has no density setting; with "
                "--backend stock it must be 1/3 (PEFT's sparse=True)"
            )
        density = {"sparse": True}
    else:
        randlora_ext.peft.enable()
    return randlora_ext.peft.RandLoraConfig(
        r=options.rank,
        randlora_alpha=_ALPHA_PER_RANK * options.rank,
        target_modules=list(options.target_modules),
        projection_prng_key=options.seed,
        save_projection=False,
        task_type="CAUSAL_LM",
        **density,
    )


def _from_pretrained(factory: Any, source: ModelSource, **options: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # the demo's own bar is the only one
    if source.gguf_file:
        options["gguf_file"] = source.gguf_file
    try:
        return factory.from_pretrained(source.location, **options)
    except (OSError, ValueError, KeyError) as error:
        raise DemoError(f"--model {source}: cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet_about_projections() -> Iterator[None]:
    """PEFT warns that bases are not saved; here that is the point."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save basis_A")
        yield
