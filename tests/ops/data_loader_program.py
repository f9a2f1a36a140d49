"""A layer inside a DataLoader's workers, while the parent trains it: `METHOD` is fork or spawn."""

import faulthandler
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from layer_helpers import inputs, make_base, randomize, run  # noqa: E402

from randlora_ext import RandLoraLinear  # noqa: E402


class Adapted(Dataset):
    """Items computed by a layer of the parent's: frozen feature extraction in a loader."""

    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        with torch.no_grad():
            return self.layer(self.x[k])


def show_where_it_hangs(worker):
    faulthandler.dump_traceback_later(60)


def main(method):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    layer = randomize(RandLoraLinear(make_base(130, 70), r=9, density=0.07))
    x, dy = inputs(layer, 24, 20)
    expected = layer(x).detach()
    before = run(layer, x, dy)  # OpenMP's threads exist by now
    loader = DataLoader(
        Adapted(layer, x),
        batch_size=4,
        num_workers=2 if method == "fork" else 1,
        multiprocessing_context=method,
        timeout=90,
        worker_init_fn=show_where_it_hangs,
    )
    batches = []
    for batch in loader:
        batches.append(batch)
        results = run(layer, x, dy)  # the parent goes on training
        assert all(torch.equal(a, b) for a, b in zip(results, before, strict=True))
    torch.testing.assert_close(torch.cat(batches), expected)


if __name__ == "__main__":
    main(sys.argv[1])
