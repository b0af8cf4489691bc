"""Cases of the methods in `formats/peft_additive.py`."""

from __future__ import annotations

from peft import LoHaConfig, TrainableTokensConfig

from tests.interop.methods import LINEAR, Case

ALONE = (("of another module", ""),)  # of one module alone a prefix that the base lacks is taken off

CASES = {
    "loha": Case(
        LoHaConfig, (*LINEAR, "conv1", "conv2", "point2"), {"r": 4, "alpha": 6}, flips={"alpha": 7}, refused={"r": 3, "alpha": None}
    ),
    "loha, effective convolutions": Case(LoHaConfig, ("conv2", "point2"), {"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    "loha, patterns": Case(
        LoHaConfig, LINEAR, {"r": 4, "alpha": 6, "rank_pattern": {"square": 2}, "alpha_pattern": {"^linear": 5}},
        flips={"alpha_pattern": {"square": 5}}, refused={"rank_pattern": None},
    ),
    "trainable tokens": Case(
        TrainableTokensConfig, ("table",), {"token_indices": [7, 3, 49, 0]},
        flips={"token_indices": [0, 3, 49, 7]}, refused={"token_indices": [7, 3, 49, 50]}, harmless=ALONE,
    ),
}  # fmt: skip
