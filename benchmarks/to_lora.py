"""What LoRA keeps of a trained RandLoRA adapter, rank by rank, beside merging.

    python benchmarks/to_lora.py --out benchmarks/results/to-lora       minutes, 2 cores

Trains as finetune.py does, converts the adapter by `export_to_lora`, and measures each result as
PEFT loads it: bytes of the file, energy (share of the squared norm of dW), held-out loss.
"""

import argparse
import tempfile
from pathlib import Path

import peft
import record
import spelling
import torch
from finetune import adapted

import randlora_ext.peft

RANKS = (16, 32, 64, 128, 256)


def measured(method: str, lr: float, steps: int, ranks: tuple[int, ...]) -> list[dict]:
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
    tuned = adapted(base, method, seed=0)
    spelling.train(tuned, tokenizer, spelling.plan_batches(training, steps, 16, 0), lr)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tuned.save_pretrained(place / "adapter")
        add("adapter", tuned, _bytes(place / "adapter"), 1.0)
        kept = {n: randlora_ext.peft.export_to_lora(tuned, place / str(n), n) for n in ranks}
        base = tuned.unload()
        for n in ranks:
            lora = peft.PeftModel.from_pretrained(base, place / str(n))
            add(f"LoRA {n}", lora, _bytes(place / str(n)), kept[n].energy)
            base = lora.unload()
        tuned = peft.PeftModel.from_pretrained(base, place / "adapter")
        merged = tuned.merge_and_unload(safe_merge=True)
        merged.save_pretrained(place / "merged")
        add("merged", merged, _bytes(place / "merged"), 1.0)
    return rows


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="randlora block:1/8", help="a RandLoRA of finetune.py")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--out", type=Path, help="write OUT.json")
    args = parser.parse_args()
    options = vars(args)
    out = options.pop("out")
    rows = measured(**options)
    if out:
        record.write(out, rows, **options)


if __name__ == "__main__":
    main()
