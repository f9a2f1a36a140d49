"""`ForgettingBudget` shows what was forgotten with every evaluation."""

import pytest
import transformers
from trainers import EVALUATED, ROWS, logged, lora, model, trainer
from transformers.trainer_utils import default_compute_objective

from randlora_ext import ForgettingBudget, forgetting

pytestmark = pytest.mark.filterwarnings("ignore")


class Reports(transformers.TrainerCallback):
    """As wandb's and TensorBoard's callbacks: sees logs before the user's callbacks."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("make", [model, lora])
def test_every_evaluation_reports_it(make, tmp_path):
    run = trainer(make(), tmp_path, budget=None, **EVALUATED)
    reports = Reports()
    run.add_callback(reports)
    run.add_callback(ForgettingBudget(run))
    run.train()
    found = [(step, log["eval_forgetting"]) for step, log in reports.seen if len(log) == 2]
    assert [step for step, _ in found] == [1, 2, 3, 3]  # and at the end
    assert found[-1][1] == pytest.approx(forgetting(run.model).nats, rel=1e-6)
    assert 0 < found[0][1] < found[1][1] < found[2][1] == found[3][1]
    assert run.evaluate()["eval_forgetting"] == found[-1][1]


def test_it_may_choose_the_best_model(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_forgetting"}
    run = trainer(model(), tmp_path, **EVALUATED | best, greater_is_better=False, save_steps=1)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    assert run.state.best_metric == logged(run, "eval_forgetting")[0]


@pytest.mark.parametrize(
    "text", [{"prompts": [[3, 4], [5]]}, {"batches": [ROWS[0]["labels"][None]]}]
)
def test_on_a_text_of_the_users(text, tmp_path):
    run = trainer(model(), tmp_path, budget=text, **EVALUATED)
    run.train()
    assert logged(run, "eval_forgetting")[-1] == forgetting(run.model, **text).nats
    assert logged(run, "eval_forgetting")[-1] != forgetting(run.model).nats


def test_a_resumed_training_reads_the_same_text(tmp_path):
    whole = trainer(model(), tmp_path, **EVALUATED)
    whole.train()
    resumed = trainer(model(), tmp_path, **EVALUATED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "eval_forgetting") == logged(whole, "eval_forgetting")


def test_a_search_for_hyperparameters_looks_at_the_loss(tmp_path):
    """Its default objective sums all metrics but the loss, if there are any."""
    run = trainer(model(), tmp_path, **EVALUATED)
    run.compute_objective = default_compute_objective  # as `hyperparameter_search` sets it
    run.train()
    metrics = run.evaluate()
    assert default_compute_objective(dict(metrics)) == metrics["eval_loss"]
    assert len(logged(run, "eval_forgetting")) == 5


def test_callbacks_of_the_trainer_see_it(tmp_path):
    """Those that were added before, too."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_forgetting"}
    best |= {"greater_is_better": False, "save_steps": 1, "max_steps": 5}
    run = trainer(model(), tmp_path, budget=None, **EVALUATED | best)
    run.add_callback(transformers.EarlyStoppingCallback(early_stopping_patience=2))
    run.add_callback(ForgettingBudget(run))
    run.train()
    assert run.state.global_step == 3  # as it rises with every step
