"""Cases of the methods in `formats/peft_additive.py` and `formats/peft_placed.py`."""

from __future__ import annotations

import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    GraloraConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    ShiraConfig,
    SupertuningConfig,
    TrainableTokensConfig,
    WaveFTConfig,
)

from tests.interop.methods import CONV1D, LINEAR, Case

ALONE = (("of another module", ""),)  # of one module alone a prefix that the base lacks is taken off
SHAPELESS = ("*gpt", "*gpt_square")  # coefficients tell no shape, and so not how a weight lies
KEPT = {"linear": [True, False, True, True], "square": [False, False, True, False]}


def pruned(name: str, tensor: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """Random numbers, but zeros for the singular values that training took off."""
    values = 0.5 * torch.randn(tensor.shape, generator=noise)
    layer = name.split(".")[-3]
    return values * torch.tensor(KEPT[layer]).unsqueeze(1) if "lora_E" in name else values


def normal(name: str, tensor: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=noise)


def large(name: str, tensor: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """What a method divides by the number of inputs or of elements."""
    return 30 * torch.randn(tensor.shape, generator=noise)


def shifted(name: str, tensor: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    return tensor + torch.randn(tensor.shape, generator=noise)


ADALORA = {"init_r": 4, "lora_alpha": 6, "total_step": 10}
LOKR = {"r": 2, "alpha": 3}
GRALORA = {"r": 4, "alpha": 6, "gralora_k": 2}
WAVEFT = {"n_frequency": 200, "scaling": 4.0, "random_loc_seed": 5}
CASES = {
    "adalora": Case(
        AdaLoraConfig, (*LINEAR, *CONV1D, "conv2", "point2"), ADALORA, normal,
        flips={"lora_alpha": 7}, refused={"init_r": 5, "lora_alpha": None},
    ),
    "adalora, pruned": Case(
        AdaLoraConfig, LINEAR, ADALORA | {"rank_pattern": {f"{name}.lora_E": mask for name, mask in KEPT.items()}}, pruned,
        flips={"lora_alpha": 9}, refused={"rank_pattern": None, "init_r": 5, "lora_alpha": 0},
    ),
    "adalora, no alpha": Case(AdaLoraConfig, LINEAR, ADALORA | {"lora_alpha": 0}, flips={"lora_alpha": 9}),
    "loha": Case(
        LoHaConfig, (*LINEAR, "conv1", "conv2", "point2"), {"r": 4, "alpha": 6}, flips={"alpha": 7}, refused={"r": 3, "alpha": None}
    ),
    "loha, effective convolutions": Case(LoHaConfig, ("conv2", "point2"), {"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    "loha, patterns": Case(
        LoHaConfig, LINEAR, {"r": 4, "alpha": 6, "rank_pattern": {"square": 2}, "alpha_pattern": {"^linear": 5}},
        flips={"alpha_pattern": {"square": 5}}, refused={"rank_pattern": None},
    ),
    "lokr": Case(
        LoKrConfig, (*LINEAR, "conv1", "conv2", "point2"), LOKR | {"decompose_both": True},
        flips={"alpha": 7}, refused={"r": 3, "alpha": None},
    ),
    "lokr, whole factors": Case(LoKrConfig, (*LINEAR, "conv1", "conv2", "point2"), {"r": 16, "alpha": 9}, flips={"alpha": 7, "r": 8}),
    "lokr, effective convolutions": Case(LoKrConfig, ("conv1", "conv2", "point2"), LOKR | {"use_effective_conv2d": True}),
    "lokr, patterns": Case(
        LoKrConfig, LINEAR, LOKR | {"decompose_factor": 4, "rank_pattern": {"square": 1}, "alpha_pattern": {"^linear": 5}},
        flips={"alpha_pattern": {"square": 5}}, refused={"rank_pattern": None},
    ),
    "c3a": Case(C3AConfig, LINEAR, {"block_size": 4}, large, refused={"block_size": 2}),
    "c3a, patterns": Case(
        C3AConfig, LINEAR, {"block_size": 4, "block_size_pattern": {"linear": 8}}, large, refused={"block_size_pattern": {"lin.*": 8}},
    ),
    "miss": Case(MissConfig, LINEAR, {"r": 7}, refused={"r": 5, "init_weights": "mini"}),
    "miss, bat": Case(MissConfig, LINEAR, {"r": 4, "init_weights": "bat"}, refused={"r": 2, "init_weights": True}),
    "miss, mini": Case(
        MissConfig, LINEAR, {"r": 8, "mini_r": 5, "init_weights": "mini"}, refused={"r": 4, "mini_r": 10, "init_weights": True}
    ),
    "delora": Case(DeloraConfig, LINEAR, {"r": 4, "delora_lambda": 2.0}, refused={"r": 2}),
    "delora, patterns": Case(
        DeloraConfig, LINEAR, {"r": 4, "rank_pattern": {"square": 2}, "lambda_pattern": {"linear": 3.0}}, refused={"rank_pattern": None}
    ),
    "gralora": Case(
        GraloraConfig, (*LINEAR, *CONV1D), GRALORA, flips={"alpha": 7}, refused={"r": 2, "gralora_k": 4, "hybrid_r": 3, "alpha": None}
    ),
    "gralora, hybrid": Case(GraloraConfig, (*LINEAR, *CONV1D), GRALORA | {"hybrid_r": 3}, flips={"alpha": 7}, refused={"hybrid_r": 0}),
    "fourierft": Case(
        FourierFTConfig, (*LINEAR, *CONV1D), {"n_frequency": 50, "scaling": 100.0, "random_loc_seed": 5}, transposed=SHAPELESS,
        flips={"scaling": 50.0, "random_loc_seed": 6}, refused={"n_frequency": 49, "scaling": None},
    ),
    "fourierft, patterns": Case(
        FourierFTConfig, LINEAR, {"n_frequency": 50, "scaling": 100.0, "n_frequency_pattern": {"linear": 70}},
        refused={"n_frequency_pattern": {"lin.*": 70}},
    ),
    "waveft": Case(
        WaveFTConfig, (*LINEAR, *CONV1D), WAVEFT, transposed=SHAPELESS,
        flips={"scaling": 3.0, "random_loc_seed": 6, "wavelet_family": "sym3", "use_idwt": False},
        refused={"n_frequency": 199, "wavelet_family": "db11"},
    ),
    "waveft, the places themselves": Case(WaveFTConfig, LINEAR, WAVEFT | {"use_idwt": False}, flips={"use_idwt": True}),
    "waveft, patterns": Case(
        WaveFTConfig, LINEAR, WAVEFT | {"n_frequency_pattern": {"lin.*": 100}, "wavelet_family": "coif2"},
        refused={"n_frequency_pattern": {"square": 100}},
    ),
    "waveft, shares": Case(
        WaveFTConfig, LINEAR, WAVEFT | {"proportional_parameters": True, "wavelet_family": "db5"},
        refused={"proportional_parameters": False},
    ),
    "shira": Case(ShiraConfig, LINEAR, {"r": 3, "random_seed": 1}),
    "super-tuning": Case(SupertuningConfig, LINEAR, {"sparsity": 0.8}, refused={"r": 2, "lora_alpha": 5.0}),
    "super-tuning, supra": Case(
        SupertuningConfig, LINEAR, {"sparsity": 0.8, "r": 3, "lora_alpha": 5.0},
        flips={"lora_alpha": 7.0}, refused={"r": None, "lora_alpha": None},
    ),
    "beft": Case(BeftConfig, LINEAR),
    "ln tuning": Case(LNTuningConfig, ("norm", "linear", *CONV1D, "conv2", "table"), {}, shifted),
    "trainable tokens": Case(
        TrainableTokensConfig, ("table",), {"token_indices": [7, 3, 49, 0]},
        flips={"token_indices": [0, 3, 49, 7]}, refused={"token_indices": [7, 3, 49, 50]}, harmless=ALONE,
    ),
}  # fmt: skip
