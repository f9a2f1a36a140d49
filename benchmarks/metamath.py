"""What we would send to PEFT's MetaMathQA comparison: a hook, and calibrated bases as a row.

    git clone --depth 1 https://github.com/huggingface/peft
    python benchmarks/metamath.py peft                        changes the checkout
    cd peft/method_comparison/MetaMathQA
    python run.py -v experiments/randlora/llama-3.2-3B-hadamard-calibrated

The last command needs a card, Python 3.12 and access to meta-llama/Llama-3.2-3B on the Hub.

The hook: an experiment's folder may hold a preprocess.py, which run.py imports before it reads the
configuration, and whose function gets the model before the first step. The row: metamath_row.py as
that file, beside a configuration and a learning rate.
"""

import argparse
import json
import shutil
from pathlib import Path

import randlora_ext.peft

NAME = "randlora/llama-3.2-3B-hadamard-calibrated"
HOOK = (  # (a line of run.py, what it becomes)
    ("import random\n", "import random\nimport runpy\n"),
    (
        "    # load configs\n",
        """\
    # an experiment may register its method, and prepare the model on training data
    path_preprocess = os.path.join(path_experiment, "preprocess.py")
    has_preprocess = os.path.exists(path_preprocess)
    preprocess = runpy.run_path(path_preprocess)["preprocess"] if has_preprocess else None

    # load configs
""",
    ),
    (
        "    print_verbose(model)\n",
        """\
    if preprocess is not None:
        ds_train, _, _ = get_train_valid_test_datasets(
            tokenizer=tokenizer, query_template=train_config.query_template, print_fn=print_verbose
        )
        preprocess(model, tokenizer, ds_train)
    print_verbose(model)
""",
    ),
)


def with_hook(run: str) -> str:
    """The text of run.py with `HOOK`; ValueError unless it has each of its lines once."""
    for line, becomes in HOOK:
        if (count := run.count(line)) != 1:
            raise ValueError(f"run.py has {line!r} {count} times, and must have it once")
        run = run.replace(line, becomes)
    return run


def add_row(experiment: Path) -> None:
    """FileExistsError if it is there."""
    experiment.mkdir(parents=True)
    randlora_ext.peft.enable()
    config = randlora_ext.peft.RandLoraConfig(
        r=32, randlora_alpha=640, basis="hadamard", target_modules="all-linear"
    )
    config.save_pretrained(experiment)
    # PEFT's default decay, 0.1, would pull gamma, and with it dW, to zero.
    training = {"optimizer_kwargs": {"lr": 2e-4, "weight_decay": 0.0}}
    (experiment / "training_params.json").write_text(json.dumps(training, indent=2) + "\n")
    shutil.copy(Path(__file__).with_name("metamath_row.py"), experiment / "preprocess.py")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="PEFT's repository")
    comparison = parser.parse_args(arguments).checkout / "method_comparison" / "MetaMathQA"
    run = comparison / "run.py"
    hooked = with_hook(run.read_text())
    add_row(comparison / "experiments" / NAME)
    run.write_text(hooked)


if __name__ == "__main__":
    main()
