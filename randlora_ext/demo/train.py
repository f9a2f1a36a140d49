"""The training loop: AdamW on lambda and gamma, linear warm-up, then cosine decay."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from .batch import answer_loss, make_batch
from .data import Example
from .errors import DemoError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_WARMUP_STEPS = 5
_FINAL_LR_SHARE = 0.1
# Random bases make single batches spike; without a bound one spike can undo ten steps.
_MAX_GRAD_NORM = 1.0


@dataclass
class History:
    """What the loop measured, one entry a step; ``tokens`` includes padding, as for the kernels."""

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def tokens_a_step(self) -> int:
        """The mean, rounded: what a typical call of an adapted layer is given."""
        return round(sum(self.tokens) / len(self.tokens))


def lr_share(step: int, steps: int) -> float:
    """Share of the peak learning rate at ``step`` of ``steps`` (both from 0)."""
    warmup = min(_WARMUP_STEPS, steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return _FINAL_LR_SHARE + (1 - _FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[Example]],
    lr: float,
    device: torch.device,
) -> History:
    """One step for each of ``batches``, on the parameters that require a gradient.

    Raises DemoError when the loss is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr_share(i, len(batches)))
    history = History()
    model.train()
    with tqdm(total=len(batches), desc="training", unit="step") as bar:
        for examples in batches:
            start = time.perf_counter()
            batch = make_batch(tokenizer, examples, device)
            loss = answer_loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            value = loss.item()
            if not math.isfinite(value):
                at = len(history.loss) + 1
                raise DemoError(f"the loss became {value} at step {at}; try --lr {lr / 4:g}")
            history.loss.append(value)
            history.seconds.append(time.perf_counter() - start)
            history.tokens.append(batch.tokens)
            bar.set_postfix(loss=f"{value:.3f}")
            bar.update()
    return history
