"""Cases of the methods in `formats/peft_banked.py`."""

from __future__ import annotations

import torch
from peft import FrodConfig, PveraConfig, RandLoraConfig, TinyLoraConfig, UniLoraConfig, VBLoRAConfig, VeraConfig

from tests.interop.methods import CONV1D, LINEAR, Case

LARGER = (("one row more", "vera_B"),)  # projections are cut to each layer: a larger one serves as well
COPY = tuple(("deleted", f"{layer}.randlora_{side}") for layer in (*LINEAR, *CONV1D) for side in "AB")  # the shared one is there
DRAWN = {"save_projection": False}


def about_itself(name: str, tensor: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """A tensor that stands for the base's own numbers, changed by a third; zeros become small numbers."""
    random = torch.randn(tensor.shape, generator=noise)
    return tensor * (1 + 0.3 * random) + 0.1 * random.flip(0)


CASES = {
    "vera": Case(VeraConfig, LINEAR, {"r": 8}, refused={"r": 4, **DRAWN}, harmless=LARGER),
    "vera, transposed": Case(VeraConfig, CONV1D, {"r": 8, "fan_in_fan_out": True}, harmless=LARGER),
    "vera, drawn": Case(
        VeraConfig, LINEAR, {"r": 8, "projection_prng_key": 3, **DRAWN}, flips={"projection_prng_key": 4},
        refused={"r": 4, "save_projection": True, "projection_prng_key": 1 << 64},
    ),
    "vera, drawn, transposed": Case(VeraConfig, CONV1D, {"r": 3, "fan_in_fan_out": True, **DRAWN}, flips={"projection_prng_key": -7}),
    "pvera": Case(PveraConfig, LINEAR, {"r": 8}, refused={"r": 4, "sample_at_inference": True, **DRAWN}, harmless=LARGER),
    "pvera, transposed": Case(PveraConfig, CONV1D, {"r": 8, "fan_in_fan_out": True}, harmless=LARGER),
    "pvera, drawn": Case(PveraConfig, LINEAR, {"r": 6, **DRAWN}, flips={"projection_prng_key": 4}, refused={"save_projection": True}),
    "randlora": Case(
        RandLoraConfig, LINEAR, {"r": 7, "randlora_alpha": 9}, flips={"randlora_alpha": 4}, refused={"r": 6, **DRAWN},
        harmless=COPY,
    ),
    "randlora, transposed": Case(RandLoraConfig, CONV1D, {"r": 5, "randlora_alpha": 3, "fan_in_fan_out": True}, harmless=COPY),
    "randlora, sparse": Case(RandLoraConfig, LINEAR, {"r": 4, "randlora_alpha": 3, "sparse": True}, harmless=COPY),
    "randlora, drawn": Case(
        RandLoraConfig, LINEAR, {"r": 7, "randlora_alpha": 9, "projection_prng_key": 1, **DRAWN},
        flips={"projection_prng_key": 2, "sparse": True, "very_sparse": True}, refused={"save_projection": True, "sparse": None},
    ),
    "randlora, drawn, transposed": Case(
        RandLoraConfig, CONV1D, {"r": 4, "randlora_alpha": 3, "sparse": True, "fan_in_fan_out": True, **DRAWN}, flips={"sparse": False}
    ),
    "vblora": Case(
        VBLoRAConfig, LINEAR, {"r": 3, "num_vectors": 12, "vector_length": 4, "topk": 2}, flips={"topk": 3},
        refused={"r": 2, "num_vectors": 11, "vector_length": 2, "topk": 0},
    ),
    "vblora, transposed": Case(VBLoRAConfig, CONV1D, {"r": 3, "num_vectors": 5, "vector_length": 4, "topk": 5, "fan_in_fan_out": True}),
    "vblora, weights": Case(
        VBLoRAConfig, LINEAR, {"r": 3, "num_vectors": 12, "vector_length": 2, "topk": 3, "save_only_topk_weights": True},
        refused={"topk": 2, "save_only_topk_weights": False},
    ),
    "vblora, one vector each": Case(
        VBLoRAConfig, CONV1D, {"r": 3, "num_vectors": 300, "vector_length": 4, "topk": 1, "save_only_topk_weights": True},
        harmless=(("nan", "_topk_weights"),),  # which are empty: the only weight is 1
    ),
    "unilora": Case(
        UniLoraConfig, LINEAR, {"r": 4, "theta_d_length": 30, "save_indices": True},
        refused={"r": 3, "theta_d_length": 31, "save_indices": False},
    ),
    "unilora, transposed": Case(UniLoraConfig, CONV1D, {"r": 4, "theta_d_length": 30, "save_indices": True, "fan_in_fan_out": True}),
    "tinylora": Case(
        TinyLoraConfig, ("table", "square", "linear"), {"r": 3, "u": 5},
        refused={"r": 2, "u": 4, "projection_seed": 43, "weight_tying": 0.5, **DRAWN},
    ),
    "tinylora, tied in part": Case(
        TinyLoraConfig, ("table", "square", "linear"), {"r": 30, "u": 5, "weight_tying": 0.4}, refused={"weight_tying": 1.5}
    ),
    "tinylora, tied": Case(TinyLoraConfig, CONV1D, {"r": 3, "u": 5, "weight_tying": 1.0, "fan_in_fan_out": True}),
    "tinylora, drawn": Case(
        TinyLoraConfig, ("linear",), {"r": 3, "u": 5, **DRAWN}, flips={"projection_seed": 7}, refused={"save_projection": True}
    ),
    "frod": Case(FrodConfig, LINEAR, {"sparse_rate": 0.1, "progressbar": False}, about_itself, refused=DRAWN),
    "frod, transposed": Case(FrodConfig, CONV1D, {"sparse_rate": 0.1, "progressbar": False, "fan_in_fan_out": True}, about_itself),
}  # fmt: skip
