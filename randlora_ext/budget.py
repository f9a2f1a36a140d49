"""`ForgettingBudget`: a callback by which transformers' Trainer forgets no more than it may."""

import logging
import math
import random
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import default_compute_objective

from .batches import check_batches
from .calibration import adapters_to_calibrate, calibrate, layers_to_calibrate
from .checks import check_number
from .dial import dialed, set_dial
from .forgetting_meter import check_text, forgetting, own_text_of
from .nn.adapted_layer import AdaptedLayer, layers_by_name
from .own_text import checked_prompts
from .ranks import failing_together, of_all_ranks
from .trainer_batches import UnreadableData, sample

logger = logging.getLogger(__name__)

CALIBRATION_BATCHES = 4  # of the training's size, on each rank
HALVINGS = 6  # of the factors from 0 to 1, so the dial is exact to 1/64


class ForgettingBudget(TrainerCallback):
    """Calibrates before the first step, shows what is forgotten, and keeps it within a budget.

    For transformers' ``Trainer`` and what is built on it, such as TRL's trainers::

        trainer = trl.SFTTrainer(...)
        trainer.add_callback(randlora_ext.ForgettingBudget(trainer, max_rise=0.2))
        trainer.train()
        trainer.save_model()

    Before the first step it calls `calibrate` on four batches of the training data, chosen by a
    random generator of its own. It also measures once, so that what prevents measuring is logged
    before training. After every evaluation, and at the end, it logs `forgetting` as
    "eval_forgetting", through the trainer, so that wandb and TensorBoard draw it. ``evaluate`` also
    returns it, so that ``metric_for_best_model`` can name it.

    If at the end, after ``load_best_model_at_end``, that is more than `max_rise`, the budget has to
    be kept: by bisection it finds the largest factor of dW, to 1/64, at which what is measured is
    within the budget; it calls `set_dial` with that factor, logs it as "dial", and evaluates before
    and after, to show what that costs. Checkpoints that were saved before stay as they are.

    It never ends a training that would run without it. What it cannot do it leaves undone, and logs
    why: as INFO what needs nothing to be done, as if training resumes or the adapter is calibrated
    already, else as WARNING. The trainer sees the batches that it sees without the callback, and
    the random generators of Python, numpy and torch (the CPU's and the current CUDA card's) keep
    their states; generators that a collator or data set owns go on. An iterable data set must begin
    anew whenever it is iterated.

    Of adapters other than ours, such as LoRA, it measures; they have neither calibration nor dial.
    It runs before the trainer's other callbacks, so that what these save or log at the end is what
    the budget leaves. In a search for hyperparameters whose objective is the sum of all metrics, as
    by default, forgetting is logged but is none of them; and a trial's objective is that before the
    dial is turned, so search without `max_rise`.

    Args:
        trainer: the one that it is added to.
        max_rise: the budget, in nats per token; None measures only.
        prompts: the text to measure on, as for `forgetting`; by default the model's own.
        batches: likewise.

    Raises TypeError or ValueError: trainer is no Trainer, max_rise no positive finite number,
    prompts are no rows of token ids, batches are not several or hold no token that counts (as an
    iterator that was used up), or both are given.

    Source: ours.
    """

    def __init__(
        self,
        trainer: Trainer,
        max_rise: float | None = None,
        prompts: Sequence[Sequence[int] | Tensor] | None = None,
        batches: Iterable[Any] | None = None,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                "trainer must be the transformers.Trainer that the callback is added to, by "
                f"trainer.add_callback(ForgettingBudget(trainer, ...)), got {trainer!r}"
            )
        if max_rise is not None:
            allowed = "a positive finite number or None"
            check_number("max_rise", max_rise, allowed, lambda v: 0 < v < math.inf)
        if prompts is not None and batches is not None:
            raise ValueError("batches and prompts are two texts; give one of them")
        self.trainer = trainer
        self.max_rise = max_rise
        self.prompts = None if prompts is None else checked_prompts(prompts)
        self.text: list[Any] | None = None
        if batches is not None:
            check_batches(batches)
            with failing_together(), _random_states_kept():
                self.text = list(batches)
            check_text(self.text)
        self.can_measure = True
        self.told_of_another = False

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        if self._is_of_another(state):
            return
        self._come_first()
        with self._or_told("not calibrated"):
            self._calibrate(train_dataloader)
            self._say("calibrated the adapter")
        self.can_measure = False
        with self._or_told("forgetting is not shown"):
            self._measure()  # the user learns before training, not after, what prevents it
            self.can_measure = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        if self._is_of_another(state) or not self.can_measure:  # which has been told
            return
        self.can_measure = False
        with self._or_told("forgetting is not shown"):
            self._show(metrics)
            self.can_measure = True

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._is_of_another(state):
            return
        if self.max_rise is not None:
            with self._or_told("the budget is not kept"):
                self._keep_budget()
        elif self.can_measure:
            with self._or_told("forgetting is not shown"):
                self._say(_told(self._show()))

    def _is_of_another(self, state: TrainerState) -> bool:
        """Whether another trainer calls, whose model is not the one measured here; warns once."""
        if state is self.trainer.state:
            return False
        if state.is_world_process_zero and not self.told_of_another:
            logger.warning(
                "this ForgettingBudget was made for another trainer, and does nothing here; add "
                "one of this trainer, ForgettingBudget(trainer, ...)"
            )
        self.told_of_another = True
        return True

    def _come_first(self) -> None:
        """Before callbacks that read the metrics of an evaluation, or save the model or close their
        log at the end."""
        # Trainer is just going through this list. It skips none and calls none twice, because the
        # callbacks after this one keep their places.
        callbacks = self.trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
            callbacks.insert(0, self)

    @contextmanager
    def _or_told(self, otherwise: str) -> Iterator[None]:
        """What is raised inside is logged behind `otherwise`, and training goes on, with the random
        numbers that it would have drawn."""
        try:
            with _random_states_kept():
                yield
        # Data sets, collators, models and trainers are the user's and may raise anything.
        except Exception as error:
            if not isinstance(error, _Cannot) and not _is_refusal(error):
                logger.warning("%s: %s", otherwise, error, exc_info=error)
            elif self.trainer.state.is_world_process_zero:
                level = logging.INFO if isinstance(error, _Needless) else logging.WARNING
                logger.log(level, "%s: %s", otherwise, error)

    def _log(self, **numbers: float) -> None:
        with self._or_told(f"{', '.join(numbers)} not logged"):
            self.trainer.log(numbers)

    def _say(self, line: str) -> None:
        # Printed, as Trainer prints its losses. By default its log shows warnings alone, and a
        # warning asks for something to be done.
        if self.trainer.state.is_world_process_zero:
            print(f"randlora_ext: {line}")

    def _calibrate(self, loader: DataLoader) -> None:
        model = self.trainer.model
        if why := _why_needless(model, self.trainer.state.global_step):
            raise _Needless(why)
        layers_to_calibrate(model)  # raises before data are read
        size = self.trainer.state.train_batch_size  # which `auto_find_batch_size` has reduced
        batches: list[dict[str, Any]] = []
        raised: Exception | None = None
        try:
            batches = sample(model, loader, size, CALIBRATION_BATCHES)
        except Exception as error:  # raised below, once all ranks know: they wait for one another
            raised = error
        whys = of_all_ranks(_in_words(raised))
        if why := next(filter(None, whys), ""):
            raise _Cannot(
                f"{why}; call randlora_ext.calibrate(model, batches) before training"
            ) from raised
        # All ranks take part in gathering the weights of a sharded model, in each forward.
        calibrate(model, batches[: min(of_all_ranks(len(batches)))])

    def _measure(self) -> float:
        model = self.trainer.model
        if self.text is None:
            self.text = own_text_of(model, self.prompts)
        return forgetting(model, self.text).nats

    def _show(self, metrics: dict[str, float] | None = None) -> float:
        nats = self._measure()
        objective = getattr(self.trainer, "compute_objective", None)
        if metrics is not None and objective is not default_compute_objective:
            metrics["eval_forgetting"] = nats  # which `evaluate` returns
        self._log(eval_forgetting=nats)
        return nats

    def _keep_budget(self) -> None:
        assert self.max_rise is not None
        rise = self._show()
        if rise <= self.max_rise:
            self._say(f"{_told(rise)}, within the budget of {self.max_rise:g}")
            return
        over = f"{_told(rise)}, over the budget of {self.max_rise:g}"
        layers, adapters = _trained(self.trainer.model)
        if not adapters:
            raise _Cannot(f"{over}, and only RandLoRA adapters on our layers have a dial")
        factor, rise = self._largest_factor_within(self.max_rise, layers, adapters)
        if not factor:
            raise _Cannot(
                f"{over}, and so they are with dW times {0.5**HALVINGS:g}; dW stays as it was"
            )
        before = self._evaluation_loss()
        for adapter in adapters:
            set_dial(self.trainer.model, factor, adapter)
        self._log(dial=factor)
        after = self._evaluation_loss()
        if after is None:  # an evaluation shows it as well
            self._log(eval_forgetting=rise)
        cost = ""
        if before is not None and after is not None:
            cost = f", at an evaluation loss of {after:.4g} (was {before:.4g})"
        self._say(f"{over}; with dW times {factor:g} they are {rise:.3g}{cost}")

    def _largest_factor_within(
        self, budget: float, layers: set[AdaptedLayer], adapters: list[str]
    ) -> tuple[float, float]:
        """Of dW, by bisection, and what is forgotten with it; (0, 0) if even the smallest factor
        is too large."""
        factor = rise = 0.0
        for halving in range(1, HALVINGS + 1):
            larger = factor + 0.5**halving
            with dialed(layers, adapters, larger):
                found = self._measure()
            if found <= budget:
                factor, rise = larger, found
        return factor, rise

    def _evaluation_loss(self) -> float | None:
        """The first one of several; None if nothing is evaluated, or that fails, which is told."""
        if self.trainer.eval_dataset is None:
            return None
        metrics: dict[str, float] = {}
        with self._or_told("not evaluated"):
            metrics = self.trainer.evaluate()
        return next((value for name, value in metrics.items() if name.endswith("_loss")), None)


class _Cannot(Exception):
    """Says in a sentence why something is left undone."""


class _Needless(_Cannot):
    """The user need not do anything about it."""


def _told(nats: float) -> str:
    return f"{nats:.3g} nats a token were forgotten"


def _in_words(error: Exception | None) -> str:
    if error is None or isinstance(error, UnreadableData):
        return str(error or "")
    return f"the trainer's data could not be read apart from training, {error!r}"


def _is_refusal(error: Exception) -> bool:
    """Whether this package raised it: then its message is a sentence that needs no traceback."""
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = Path(frames[-1][0].f_code.co_filename) if frames else Path()
    return isinstance(error, (TypeError, ValueError)) and Path(__file__).parent in raised_in.parents


def _why_needless(model: nn.Module, step: int) -> str:
    """Why nothing is left to calibrate; "" if something is. Raises `_Cannot` if only some
    adapters are calibrated."""
    if step:
        return f"training resumes after step {step}"
    layers = layers_by_name(model).values()
    if not layers:
        return "the model has no RandLoRA adapter"
    active = [(layer, name) for layer in layers for name in adapters_to_calibrate(layer)]
    if not active:
        return "no active adapter that trains is on Hadamard bases, which alone scale their inputs"
    done = sorted({name for layer, name in active if layer.is_calibrated(name)})
    if not done:
        return ""
    in_words = f"adapter {', '.join(map(repr, done))} is calibrated already"
    rest = sorted({name for _, name in active} - {*done})
    if rest:  # calibrating them would calibrate `done`, too, which perhaps is trained
        raise _Cannot(
            f"{in_words}, and {', '.join(map(repr, rest))} is not; before training, activate it "
            "alone and call randlora_ext.calibrate(model, batches)"
        )
    return in_words


def _trained(model: nn.Module) -> tuple[set[AdaptedLayer], list[str]]:
    """Our layers, and the active adapters that train."""
    layers = set(layers_by_name(model).values())
    return layers, sorted({name for layer in layers for name in layer._trained_adapters()})


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Collators draw masks and data sets augment: whatever they drew, training draws again."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
