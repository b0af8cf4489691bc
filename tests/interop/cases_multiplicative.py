"""Cases of the methods in `formats/peft_multiplicative.py`."""

from __future__ import annotations

from peft import IA3Config

from tests.interop.methods import CONV1D, LINEAR, Case, near_one

CASES = {
    "ia3": Case(IA3Config, (*LINEAR, "conv2", "point2", "conv3"), {"feedforward_modules": []}, near_one),
    "ia3, before the layer": Case(
        IA3Config, (*LINEAR, "conv2", "conv3"), {"feedforward_modules": ["square", "conv2", "conv3"]}, near_one,
        refused={"feedforward_modules": ["linear"]},
    ),
    "ia3, transposed": Case(IA3Config, CONV1D, {"feedforward_modules": ["gpt"], "fan_in_fan_out": True}, near_one),
}  # fmt: skip
