"""PEFT's MetaMathQA comparison with calibrated Hadamard bases on the MLP, by PEFT's own runner.

    git clone --depth 1 https://github.com/huggingface/peft
    pip install datasets bitsandbytes                     Python 3.12, which PEFT's runner needs
    python benchmarks/metamath.py peft --lr 2e-4          on a card: Llama-3.2-3B, 5,000 steps
    python benchmarks/metamath.py peft --dry              a tiny random model and data set, on a CPU

`peft` is the checkout, whose method_comparison/MetaMathQA is copied to --work and gets one more
experiment; its data, training, evaluation and log stay PEFT's. The model needs access to
meta-llama/Llama-3.2-3B on the Hub, or --model with a folder that has it. The log, with accuracy,
forgetting, time and memory, is in WORK/temporary_results. What PEFT's table has, and what we
expect, stands in docs/density.md.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch

NAME = "randlora/llama-3.2-3B-hadamard-calibrated"
BATCHES = 16  # for `calibrate`: 64 questions with answers, some 10,000 tokens


def prepare(checkout: Path, work: Path, args: argparse.Namespace) -> None:
    """PEFT's comparison in `work`, with our experiment."""
    import randlora_ext.peft

    source = checkout / "method_comparison" / "MetaMathQA"
    shutil.copytree(source, work, ignore=shutil.ignore_patterns("*results"), dirs_exist_ok=True)
    for folder in ("results", "temporary_results", "cancelled_results"):
        (work / folder).mkdir(exist_ok=True)
    experiment = work / "experiments" / NAME
    experiment.mkdir(parents=True, exist_ok=True)
    randlora_ext.peft.RandLoraConfig(
        basis="hadamard",
        r=args.r,
        randlora_alpha=20 * args.r,
        projection_prng_key=0,
        target_modules=args.targets.split(","),
    ).save_pretrained(experiment)
    # PEFT's default weight decay, 0.1, would pull gamma, and so dW, to zero.
    optimizer = {"lr": args.lr, "weight_decay": 0.0}
    training = {"optimizer_kwargs": optimizer, "compile": args.compile}
    if args.model:
        training["model_id"] = str(Path(args.model).resolve())
    if args.dry:
        training |= {"max_steps": 4, "eval_steps": 2, "dtype": "float32", "batch_size_eval": 4}
    (experiment / "training_params.json").write_text(json.dumps(training))


def calibrating(get_model, args: argparse.Namespace):
    """PEFT's `get_model`, whose result is calibrated on the first training examples."""
    import data
    import utils

    import randlora_ext

    def made(**options):
        model = get_model(**options)
        params = utils.get_train_config(Path("experiments", NAME, utils.FILE_NAME_TRAIN_PARAMS))
        tokenizer = utils.get_tokenizer(
            model_id=params.model_id, max_seq_length=params.max_seq_length
        )
        rows, *_ = data.get_train_valid_test_datasets(
            tokenizer=tokenizer, query_template=params.query_template, print_fn=print
        )
        names, size = ("input_ids", "attention_mask"), params.batch_size
        batches = (
            tokenizer.pad({k: rows[i : i + size][k] for k in names}, return_tensors="pt")
            for i in range(0, BATCHES * size, size)
        )
        if not args.uncalibrated:
            randlora_ext.calibrate(model, ({k: b[k] for k in names} for b in batches))
        return model

    return made


# ---- a dry run -----------------------------------------------------------------------------------


def tiny_model(folder: Path) -> None:
    """A random Llama of five tokens, whose loss per token, ln 5, passes PEFT's check."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0, "the": 1, "is": 2, "step": 3, "</s>": 4}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"unk_token": "?", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 5}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


def without_card_and_hub() -> None:
    """Has PEFT's modules compute on the CPU, and read a data set that is made here."""
    import datasets
    import peft.utils

    peft.utils.infer_device = lambda: "cuda"  # utils.py demands one
    import utils

    utils.device = "cpu"
    import run

    run.init_accelerator = lambda: 0
    torch.cuda.get_device_name = lambda *_: "none"
    rows = [{"q": f"what is the step {i} ?", "a": f"the step #### {i}"} for i in range(80)]
    questions, answers = [row["q"] for row in rows], [row["a"] for row in rows]
    meta = {"query": questions, "response": answers, "type": questions}
    meta["original_question"] = questions
    gsm = datasets.Dataset.from_dict({"question": questions, "answer": answers})
    few = datasets.DatasetDict({"train": gsm, "test": gsm.select(range(4))})
    import data

    data.load_dataset = lambda name, *_: (
        few if "gsm8k" in name else {"train": datasets.Dataset.from_dict(meta)}
    )
    run.get_wiki_small = lambda: ["the step is the step"] * 4


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="PEFT's repository")
    parser.add_argument("--work", type=Path, default=Path("metamath"), help="folder for the run")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--targets", default="gate_proj,up_proj,down_proj", help="kinds of layers")
    parser.add_argument("--model", help="a folder with the model, in place of the Hub's")
    parser.add_argument("--compile", action="store_true", help="as PEFT's `compile`")
    parser.add_argument("--uncalibrated", action="store_true", help="for comparison")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU, without the Hub")
    args = parser.parse_args(arguments)

    import randlora_ext.peft

    randlora_ext.peft.enable()
    if args.dry:
        args.model = args.work / "tiny"
        tiny_model(args.model)
    prepare(args.checkout, args.work, args)
    os.chdir(args.work)  # PEFT's runner wants ./experiments/METHOD/NAME
    sys.path.insert(0, os.getcwd())
    if args.dry:
        without_card_and_hub()
    import run
    import utils

    run.print_verbose = print
    # PEFT files a run under the git branch of its own installation.
    run.get_peft_branch = utils.get_peft_branch = lambda: "randlora_ext"
    run.get_model = calibrating(run.get_model, args)
    run.main(path_experiment=f"experiments/{NAME}", experiment_name=NAME, clean=True,
             bucket_name=None)  # fmt: skip


if __name__ == "__main__":
    main()
