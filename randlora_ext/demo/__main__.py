"""``python -m randlora_ext.demo``: the story from top to bottom."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence

import torch

from . import assets, data, evaluate, model, report, train
from .errors import DemoError
from .options import choose_device, make_folder, parse_options

HELD_OUT = 128  # examples whose loss is measured before and after
ANSWERED = 32  # of these, so many are also answered greedily
# The reloaded adapter repeats the same sums: no difference on a CPU, but a GPU may reorder them.
RELOAD_TOLERANCE = 1e-5  # relative to the largest logit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. 0: all is well; 1: the reloaded adapter differs; 2: something to put right."""
    try:
        return run(parse_options(arguments))
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Fine-tune, compare, save, reload, report."""
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {text}", flush=True)

    # What is needed, checked before anything slow.
    assets.check_packages(options.model, options.data)
    source, data_path = assets.find_model(options.model), assets.find_data(options.data)
    device, out = choose_device(options.device), make_folder(options.out)
    adapter = model.AdapterOptions(
        options.rank, options.density, options.seed, options.target_modules, options.backend
    )
    if source.is_local:
        assets.go_offline()
    # PEFT calls what transformers deprecated: no matter for who watches the demo.
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(options.seed)

    # Data and model.
    training, held_out = data.split_examples(data.read_examples(data_path), HELD_OUT)
    answered = held_out[:ANSWERED]
    say(f"data: {data_path}: {len(training):,} examples to train on, {len(held_out)} held out")
    say(f"model: {source} ...")
    tokenizer = model.load_tokenizer(source)
    base = model.load_base_model(source, device)
    tuned = model.attach_adapter(base, adapter)
    trained, total = model.count_parameters(tuned)
    say(f"RandLoRA attached: {trained:,} of {total:,} parameters are trained")

    # Before, training, after.
    say(f"before: loss on {len(held_out)} held-out examples, {len(answered)} greedy answers ...")
    loss_before = evaluate.held_out_loss(tuned, tokenizer, held_out, device)
    before = evaluate.greedy_answers(tuned, tokenizer, answered, device)
    say(f"training: {options.steps} steps of {options.batch_size} examples on {device}")
    batches = data.plan_batches(training, options.steps, options.batch_size, options.seed)
    history = train.train(tuned, tokenizer, batches, options.lr, device)
    say("after: the same questions ...")
    loss_after = evaluate.held_out_loss(tuned, tokenizer, held_out, device)
    after = evaluate.greedy_answers(tuned, tokenizer, answered, device)

    # Save, reload on a fresh base model, compare.
    say("saving the adapter, and reloading it on a fresh base model ...")
    adapter_bytes = model.save_adapter(tuned, out / "adapter")
    expected = evaluate.check_logits(tuned, tokenizer, answered, device)
    fresh = model.load_base_model(source, device)
    bare = evaluate.check_logits(fresh, tokenizer, answered, device)
    reloaded = model.reload_adapter(fresh, out / "adapter")
    actual = evaluate.check_logits(reloaded, tokenizer, answered, device)
    difference = (actual - expected).abs().max().item()
    same = difference <= RELOAD_TOLERANCE * expected.abs().max().item()

    # Report.
    pairs = [(answered, before), (answered, after)]
    results = {
        "options": report.as_json(vars(options)),
        "model": str(source),
        "data": str(data_path),
        "machine": report.describe_machine(device),
        "kernels": model.describe_kernels(tuned, history.tokens_a_step),
        "examples": {"train": len(training), "held_out": len(held_out), "answered": len(answered)},
        "parameters": {"trained": trained, "total": total},
        "held_out_loss": [loss_before, loss_after],
        "exact_answers": [evaluate.exact_matches(*pair) for pair in pairs],
        "symbol_error_rate": [evaluate.symbol_error_rate(*pair) for pair in pairs],
        "answers": report.answer_rows(answered, before, after),
        "adapter_bytes": adapter_bytes,
        "reload": {
            "max_difference": difference,
            "same": same,
            "max_difference_without_adapter": (bare - expected).abs().max().item(),
        },
        "train_loss": history.loss,
        "step_seconds": history.seconds,
        "step_tokens": history.tokens,
        "total_seconds": time.perf_counter() - started,
    }
    report.plot_loss(out / "loss.png", results)
    report.write_results(out / "results.json", results)
    print(report.summary(results, out))
    if not same:
        print("error: the reloaded adapter does not give the same logits", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
