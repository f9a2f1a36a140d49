"""Small models on stock PEFT and on randlora_ext with equal weights."""

import contextlib
import copy
import json
import warnings

import pytest
import torch
from layer_helpers import relative as relative
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn

peft = pytest.importorskip("peft")

import randlora_ext.peft as accelerated  # noqa: E402
from randlora_ext.peft.layer import AcceleratedLinear  # noqa: E402

PEFT = tuple(Version(peft.__version__).release)
# Before 0.21.2 PEFT's class for this task asks for a method that newer transformers do not have.
SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM" if PEFT >= (0, 21, 2) else None
StockLinear = peft.tuners.randlora.layer.Linear
RANDLORA = peft.PeftType.RANDLORA


class Net(nn.Module):
    """Two more targeted layers of other shapes make PEFT's shared bases larger than needed."""

    def __init__(self, in_features, out_features, layer_type=nn.Linear):
        super().__init__()
        torch.manual_seed(in_features * 1000 + out_features)
        make = (lambda i, o: layer_type(o, i)) if layer_type is not nn.Linear else nn.Linear
        self.a, self.b = make(in_features, out_features), make(out_features, in_features)
        self.c = nn.Linear(72, 80)

    def forward(self, x):
        return self.a(x)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 40)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Headed(Deep):
    """With a layer for modules_to_save."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(40, 3)

    def forward(self, x):
        return self.head(super().forward(x))


class Wide(Deep):
    """With a layer that is larger than the others."""

    def __init__(self):
        super().__init__()
        self.wide, self.other = nn.Linear(40, 24), nn.Linear(24, 90)

    def forward(self, x):
        return self.other(self.wide(super().forward(x)))


def t5():
    """(a model of an encoder and a decoder, what of it is adapted)"""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    more = {"vocab_size": 50, "decoder_start_token_id": 0, "dropout_rate": 0.0}
    adapt = {"targets": ["q", "v", "wi", "wo"], "task_type": SEQ_2_SEQ_LM}
    return T5ForConditionalGeneration(T5Config(**shape, **more)), adapt


def small_llama():
    from language_models import llama

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    return llama(), {"targets": targets, "task_type": "CAUSAL_LM"}


def trainer_of(model, folder, rows, **options):
    """Transformers' Trainer for three steps, of which the second is saved."""
    from transformers import Trainer, TrainingArguments

    steps = {"max_steps": 3, "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-2}
    about = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1}
    options |= {"per_device_train_batch_size": 2, **steps, **about}
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model=model, args=TrainingArguments(str(folder), **options), train_dataset=data)


def config(r=4, cls=None, targets="abc", **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save basis_A")
        return (cls or peft.RandLoraConfig)(r=r, target_modules=list(targets), **options)


def randomize(model, seed=0, size=1):
    """Random diagonals: of `size` 1 they make adapter and base equally important."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora_lambda" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size * 1e-3)
            elif "randlora_gamma" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def shake(model):
    """Changes what is trained beside the diagonals: biases, modules_to_save."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "randlora_" not in name:
                parameter.add_(torch.randn_like(parameter))


def adapted(base, targets, r=5, seed=0, **options):
    """`base` on our layers, by our configuration, with random diagonals."""
    accelerated.enable()
    chosen = config(r, accelerated.RandLoraConfig, targets, **options)
    return randomize(peft.get_peft_model(base, chosen), seed)


def made(seed=0, base=Deep, r=5, targets="abc", **options):
    return adapted(base(), targets, r, seed, **options)


def stock_made(seed=0, base=Deep, r=5, targets="abc", **options):
    """The same on stock PEFT, which is in force afterwards."""
    accelerated.disable()
    return randomize(peft.get_peft_model(base(), config(r, None, targets, **options)), seed)


def opened(folder, base=Deep, **options):
    return peft.PeftModel.from_pretrained(base(), folder, **options)


def numbers(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def edit(file, **changes):
    """Changes fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@contextlib.contextmanager
def edited(folder):
    """The tensors of a saved adapter, which are written back."""
    file = folder / "adapter_model.safetensors"
    yield (state := load_file(file))
    save_file(state, file)


def pair(base, make_config, seed=0, **options):
    """(stock PEFT's model, ours), equal in all numbers."""
    models = []
    for choose in (accelerated.disable, accelerated.enable):
        choose()
        model = peft.get_peft_model(copy.deepcopy(base), make_config(), **options)
        models.append(randomize(model, seed))
    return models


def layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.randlora.RandLoraLayer)]


def scales(model, name="default"):
    """Of the inputs of each layer."""
    return [layer.randlora_input_scale[name] for layer in layers(model)]


def are_calibrated(model, name="default"):
    """Of each layer, whether the adapter is."""
    return [layer.is_calibrated(name) for layer in layers(model)]


def dense_of(model, name="default"):
    """A and B as tensors."""
    bases = (getattr(model, matrix)[name] for matrix in ("randlora_A", "randlora_B"))
    return [basis.dense() if hasattr(basis, "dense") else basis for basis in bases]


def deltas(model):
    return [layer.get_delta_weight("default") for layer in layers(model)]


def runs_on_kernels(model):
    return all(
        type(m) is AcceleratedLinear and "plain" not in m.describe(name)
        for m in layers(model)
        for name in m.active_adapters
    )


def run(model, x, dy):
    """y, dx and every gradient of lambda and gamma that the model gives."""
    model.zero_grad()
    torch.manual_seed(3)  # for dropout
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    return [y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_close(results, expected, tolerance):
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert relative(result, wanted) < tolerance


def inputs(in_features, out_features, dtype=torch.float32, tokens=12):
    torch.manual_seed(1)
    return [torch.randn(2, tokens, n).to(dtype) for n in (in_features, out_features)]
