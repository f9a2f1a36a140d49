"""A tuner that gives ms-swift the type "randlora":

    swift sft --external_plugins examples/ms_swift_randlora.py --tuner_type randlora \
        --target_modules all-linear --callbacks forgetting \
        --lora_rank 32 --lora_alpha 640 --learning_rate 1e-3 --weight_decay 0

The callback calibrates a new adapter before the first step, so that the model forgets less, and
logs with every evaluation how much it forgets. dW is scaled by lora_alpha / lora_rank; ms-swift's
own defaults are for LoRA. Written for ms-swift 4.6: a tuner makes, saves and loads the model
(swift/tuner_plugin/base.py).
"""

import peft
from swift.callbacks import callbacks_map
from swift.tuner_plugin import PeftTuner, tuners_map
from swift.utils import find_all_linears

import randlora_ext.peft


class RandLoraTuner(PeftTuner):
    """RandLoRA on the compiled kernels; ms-swift saves and loads it as any adapter of PEFT."""

    @staticmethod
    def prepare_model(args, model):
        targets = args.target_modules
        if "all-linear" in targets:
            targets = [name for name in targets if name != "all-linear"] + find_all_linears(model)
        return peft.get_peft_model(
            model,
            randlora_ext.peft.RandLoraConfig(
                r=args.lora_rank,
                randlora_alpha=args.lora_alpha,
                randlora_dropout=args.lora_dropout,
                target_modules=targets,
                basis="hadamard",
                task_type="CAUSAL_LM",
            ),
        )


randlora_ext.peft.enable()  # for loading, too
tuners_map["randlora"] = RandLoraTuner
callbacks_map["forgetting"] = lambda args, trainer: randlora_ext.ForgettingBudget(trainer)
