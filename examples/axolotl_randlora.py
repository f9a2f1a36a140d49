"""A plugin that gives axolotl the adapter "randlora". In axolotl's YAML file:

    plugins: [axolotl_randlora.RandLoraPlugin]   # with examples/ on PYTHONPATH
    adapter: randlora
    lora_r: 32
    lora_alpha: 640               # dW is scaled by 640 / 32 = 20
    lora_target_linear: true      # or lora_target_modules: [gate_proj, up_proj, down_proj]
    learning_rate: 1e-3
    weight_decay: 0.0

A new adapter is calibrated before the first step, so that the model forgets less. Evaluations log
how much it forgets.

Written for axolotl 0.19: a plugin names its adapter and loads it (axolotl/integrations/base.py).
"""

import peft
from axolotl.integrations.base import AdapterCapabilities, BasePlugin

import randlora_ext.peft


class RandLoraPlugin(BasePlugin):
    """RandLoRA on the compiled kernels, with the fields that axolotl has for LoRA."""

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="randlora")]

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        """(model with the adapter, its configuration); None leaves other adapters to axolotl."""
        if cfg.adapter != "randlora":
            return None
        randlora_ext.peft.enable()
        config = configuration(cfg)
        if config_only:  # DPO and KTO make the model themselves
            return None, config
        options = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            trains = not inference
            folder = cfg.lora_model_dir
            model = peft.PeftModel.from_pretrained(model, folder, is_trainable=trains, **options)
        else:
            model = peft.get_peft_model(model, config, **options)
        return model, config

    def add_callbacks_post_trainer(self, cfg, trainer):
        if cfg.adapter != "randlora":
            return []
        return [randlora_ext.ForgettingBudget(trainer)]


def configuration(cfg) -> randlora_ext.peft.RandLoraConfig:
    """From axolotl's configuration; ValueError if it lacks r, alpha or targets."""
    targets = "all-linear" if cfg.lora_target_linear else cfg.lora_target_modules
    if not (cfg.lora_r and cfg.lora_alpha and targets):
        raise ValueError(
            "adapter: randlora needs lora_r, lora_alpha, and lora_target_linear or "
            f"lora_target_modules, got {cfg.lora_r}, {cfg.lora_alpha}, {targets}"
        )
    return randlora_ext.peft.RandLoraConfig(
        r=cfg.lora_r,
        randlora_alpha=cfg.lora_alpha,
        randlora_dropout=cfg.lora_dropout or 0.0,
        target_modules=targets,
        modules_to_save=cfg.lora_modules_to_save or None,
        basis="hadamard",
        task_type="CAUSAL_LM",
    )
