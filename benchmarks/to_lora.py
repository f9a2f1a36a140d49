"""What LoRA keeps of a trained RandLoRA adapter, rank by rank, beside merging.

    python benchmarks/to_lora.py --steps 24 --out benchmarks/results/to-lora-NAME
    python benchmarks/to_lora.py --adapter randlora-demo/adapter        one that is trained already

Trains as finetune.py does, converts the adapter by `export_to_lora`, and measures each result as
PEFT loads it: bytes of the file, energy (share of the squared norm of dW), held-out loss.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import peft
import record
import torch
from finetune import adapted

import randlora_ext.peft

RANKS = (16, 32, 64, 128, 256)


def measured(
    method: str, lr: float, steps: int, ranks: Sequence[int], adapter: Path | None
) -> list[dict]:
    import spelling  # of examples/, which finetune has put into the path

    torch.manual_seed(0)
    training, held_out = spelling.read_words()
    tokenizer, base = spelling.load_model()
    rows: list[dict] = []

    def add(form: str, model, size: int, energy: float) -> None:
        loss = spelling.held_out_loss(model, tokenizer, held_out)
        row = {"form": form, "bytes": size, "energy": energy, "held_out_loss": loss}
        record.show(row, header=not rows)
        rows.append(row)

    add("untuned", base, 0, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if adapter is None:
            tuned = adapted(base, method, seed=0)
            batches = spelling.plan_batches(training, steps, 16, 0)
            list(spelling.train(tuned, tokenizer, batches, lr))
            adapter = place / "adapter"
            tuned.save_pretrained(adapter)
            base = tuned.unload()
        randlora_ext.peft.enable()
        tuned = peft.PeftModel.from_pretrained(base, adapter)
        add("adapter", tuned, _bytes(adapter), 1.0)
        kept = {n: randlora_ext.peft.export_to_lora(tuned, place / str(n), n) for n in ranks}
        base = tuned.unload()
        for n in ranks:
            lora = peft.PeftModel.from_pretrained(base, place / str(n))
            add(f"LoRA {n}", lora, _bytes(place / str(n)), kept[n].energy)
            base = lora.unload()
        tuned = peft.PeftModel.from_pretrained(base, adapter)
        merged = tuned.merge_and_unload(safe_merge=True)
        size = sum(p.numel() * p.element_size() for p in merged.parameters())
        add("merged", merged, size, 1.0)
    return rows


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="randlora hadamard", help="a RandLoRA of finetune.py")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--adapter", type=Path, help="of SmolLM2-135M; instead of training one")
    parser.add_argument("--out", type=Path, help="write OUT.json")
    args = parser.parse_args(arguments)
    options = vars(args)
    out = options.pop("out")
    rows = measured(**options)
    if out:
        record.write(out, rows, **{name: str(value) for name, value in options.items()})


if __name__ == "__main__":
    main()
