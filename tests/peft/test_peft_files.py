"""randlora_ext.peft: saving and loading, together with stock PEFT, and saves that are cut off."""

import os
import resource

import pytest
import torch
from peft_helpers import (
    Deep,
    accelerated,
    assert_close,
    deltas,
    layers,
    made,
    opened,
    stock_made,
)
from safetensors.torch import load_file

from randlora_ext.writing import appear_together

TENSORS = "adapter_model.safetensors"
KEY_ALONE = {"sparse": True, "save_projection": False}
DRAWN = {"density": 0.07, "save_projection": False}


@pytest.mark.parametrize("kind", [{"sparse": True}, {}], ids=["packed", "uniform"])
def test_a_file_in_float32_is_not_rounded_on_a_bf16_base(tmp_path, kind):
    stock = stock_made(**kind)
    stock.save_pretrained(tmp_path / "float32")
    accelerated.enable()
    loaded = opened(tmp_path / "float32", lambda: Deep().bfloat16())
    assert_close(deltas(loaded), deltas(stock), 1e-6)
    for mine, theirs in zip(layers(loaded), layers(stock), strict=True):
        for name in ("randlora_A", "randlora_B"):
            assert torch.equal(getattr(mine, name)["default"] + 0, getattr(theirs, name)["default"])
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / each / TENSORS) for each in ("float32", "again"))
    assert all(torch.equal(again[name], first[name]) for name in again)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def killed_between(monkeypatch, model, folder):
    """Saves, and dies after the tensors are renamed and before the configuration is."""
    replace = os.replace

    def once(source, target):
        if str(target) == str(folder / "adapter_config.json"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", once)
        # A killed process tidies nothing. (Debian's tempfile has an rmtree of its own.)
        patch.setattr("tempfile.TemporaryDirectory.cleanup", lambda self: self._finalizer.detach())
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(folder)


TORN = {
    "key": (KEY_ALONE, KEY_ALONE | {"projection_prng_key": 2}, "projection_prng_key is 2, not 0"),
    "alpha": ({"sparse": True}, {"sparse": True, "randlora_alpha": 9}, "randlora_alpha is 9, not"),
    "seed": (DRAWN, {"basis": "independent"}, "independent-1:density=0.333"),
    "r": ({"r": 5, **KEY_ALONE}, {"r": 6, **KEY_ALONE}, "r is 6, not 5"),
    "targets": ({"targets": "ab"}, {"targets": "a"}, r"target_modules is \['a'\], not \['"),
}


@pytest.mark.parametrize("old,new,message", TORN.values(), ids=TORN)
def test_tensors_of_another_save(tmp_path, monkeypatch, old, new, message, x):
    made(**old).save_pretrained(tmp_path)
    killed_between(monkeypatch, made(seed=2, **new), tmp_path)
    base, running = Deep(), made(seed=4, **old)
    before = running(x)
    for door in (
        lambda: opened(tmp_path, lambda: base),
        lambda: running.load_adapter(tmp_path, "two"),
        lambda: accelerated.hotswap_adapter(running, tmp_path),
        lambda: accelerated.RandLoraConfig.from_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=f"adapter_config.json does not belong .*{message}"):
            door()
    assert torch.equal(base(x), Deep()(x)) and torch.equal(running(x), before)
    assert list(tmp_path.glob(".randlora-writing-*"))
    model = made(seed=5, **new)
    model.save_pretrained(tmp_path)  # which also tidies up
    assert not list(tmp_path.glob(".randlora-writing-*"))
    assert torch.equal(opened(tmp_path, lambda: base)(x), model(x))


def test_the_scratch_folder_of_a_living_process_stays(tmp_path):
    with appear_together(tmp_path) as one, appear_together(tmp_path) as two:
        for number, scratch in enumerate((one, two)):
            (scratch / str(number)).touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


WRITERS = {
    "save_pretrained": lambda model, path: model.save_pretrained(path),
    "a pickle": lambda model, path: model.save_pretrained(path, safe_serialization=False),
    "export_to_peft": lambda model, path: accelerated.export_to_peft(model, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_cannot_be_written(tmp_path, monkeypatch, writer):
    """A full disk and bad names: one kind of error, and the old files stay."""
    model, write = made(density=0.2), WRITERS[writer]
    write(model, tmp_path / "folder")
    files = contents(tmp_path / "folder")
    largest = max(map(len, files.values()))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, largest - 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match="/folder cannot be written: .*(large|full)") as told:
                write(model, tmp_path / "folder")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert ".randlora" not in str(told.value)
        assert contents(tmp_path / "folder") == files
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="^'' cannot be written: the name is empty"):
        write(model, "")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="^file/below cannot be written: .*Not a directory"):
        write(model, "file/below")
    (tmp_path / "link").symlink_to("target")
    write(model, "link")
    assert contents(tmp_path / "target").keys() == files.keys()
    assert sorted(os.listdir()) == ["file", "folder", "link", "target"]


def test_files_that_are_links(tmp_path, x):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    for name in (TENSORS, "adapter_config.json"):
        (folder / name).symlink_to(elsewhere / name)
    model = made(density=0.2)
    model.save_pretrained(folder)
    assert all((folder / path.name).is_symlink() for path in elsewhere.iterdir())
    assert torch.equal(opened(elsewhere)(x), model(x))


CASTS = [  # each pair of values once
    ({"sparse": True}, True, torch.bfloat16, torch.bfloat16),
    ({"sparse": True}, False, torch.float16, torch.float32),
    ({"very_sparse": True}, True, torch.float16, torch.float32),
    ({"very_sparse": True}, False, torch.bfloat16, torch.bfloat16),
    ({"density": 0.2}, False, torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("options,save_projection,dtype,back", CASTS, ids=str)
def test_a_round_trip_after_a_cast(tmp_path, options, save_projection, dtype, back):
    """The value of 16-bit bases is rounded only where a file holds the rounded one."""
    model = made(save_projection=save_projection, **options).to(dtype).to(back)
    model.save_pretrained(tmp_path)
    new = opened(tmp_path, lambda: Deep().to(back))
    over = made(save_projection=save_projection, **options).to(back)
    over.load_adapter(tmp_path, "default")
    for loaded in (new, over):
        assert_close(deltas(loaded), deltas(model), 1e-6)
        for ours, theirs in zip(layers(loaded), layers(model), strict=True):
            assert_close(*(one.get_scaled_bases("default") for one in (ours, theirs)), 1e-6)
