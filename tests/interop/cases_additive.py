"""Cases of the methods in `formats/peft_additive.py`."""

from __future__ import annotations

from peft import LoHaConfig

from tests.interop.methods import LINEAR, Case

CASES = {
    "loha": Case(
        LoHaConfig, (*LINEAR, "conv1", "conv2", "point2"), {"r": 4, "alpha": 6}, flips={"alpha": 7}, refused={"r": 3, "alpha": None}
    ),
    "loha, effective convolutions": Case(LoHaConfig, ("conv2", "point2"), {"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    "loha, patterns": Case(
        LoHaConfig, LINEAR, {"r": 4, "alpha": 6, "rank_pattern": {"square": 2}, "alpha_pattern": {"^linear": 5}},
        flips={"alpha_pattern": {"square": 5}}, refused={"rank_pattern": None},
    ),
}  # fmt: skip
