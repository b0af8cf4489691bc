"""Cases of LoRA's variants (`formats/peft_variants.py`): other layouts, another formula, tensors that only training reads."""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from tests.interop.methods import LINEAR, Case

BLOCKS = {"target_modules_bd_a": ["linear"], "target_modules_bd_b": ["square"], "nblocks": 4, "match_strict": True}
VELORA = {"num_groups": 6, "scale": 1.0, "init_type": "random"}
SAMPLER = {"num_samples": 5, "buffer_size": 3}

CASES = {
    "bdlora": Case(
        LoraConfig, LINEAR, {"r": 8, "lora_alpha": 6, "use_bdlora": BdLoraConfig(**BLOCKS)}, flips={"lora_alpha": 5, "use_rslora": True},
        refused={
            "r": 4, "lora_bias": True, "use_dora": True, "enable_lora": [True], "kasa_config": {"beta": 0.0001},
            "use_bdlora": {**BLOCKS, "target_modules_bd_a": ["square"]},
        },
    ),
    "bdlora, mixed with plain layers": Case(
        LoraConfig, LINEAR, {"r": 8, "use_bdlora": BdLoraConfig(None, ["lin"], nblocks=2, match_strict=False)},
        refused={
            "use_bdlora": {"target_modules_bd_a": None, "target_modules_bd_b": ["lin"], "nblocks": 2, "match_strict": True},
            "use_rslora": "yes",
        },
    ),
    "kasa": Case(
        LoraConfig, LINEAR, {"r": 4, "lora_alpha": 6, "kasa_config": KasaConfig()},
        flips={"lora_alpha": 5, "use_rslora": True, "alpha_pattern": {"square": 3}},
        refused={"kasa_config": None, "r": 3, "init_lora_weights": "pissa", "use_qalora": True},
    ),
    "kasa with a bias": Case(LoraConfig, LINEAR, {"r": 4, "lora_bias": True, "kasa_config": KasaConfig()}),
    "velora": Case(
        LoraConfig, LINEAR, {"r": 4, "lora_alpha": 6, "velora_config": VeloraConfig(**VELORA)}, flips={"lora_alpha": 5},
        refused={"velora_config": {**VELORA, "num_groups": 7}, "monteclora_config": SAMPLER, "use_dora": True},
        harmless=(("nan", "lora_velora_embed"),),  # not read in evaluation, whatever it holds
    ),
    "monteclora": Case(
        LoraConfig, LINEAR, {"r": 4, "lora_alpha": 6, "monteclora_config": MontecloraConfig(**SAMPLER)}, flips={"lora_alpha": 5},
        refused={"monteclora_config": {**SAMPLER, "num_samples": 4}, "velora_config": VELORA},
        harmless=tuple(("nan", end) for end in ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")),
    ),
}  # fmt: skip
