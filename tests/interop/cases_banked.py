"""Cases of the methods in `formats/peft_banked.py`."""

from __future__ import annotations

from peft import VeraConfig

from tests.interop.methods import CONV1D, LINEAR, Case

LARGER = (("one row more", "vera_B"),)  # projections are cut to each layer: a larger one serves as well

CASES = {
    "vera": Case(VeraConfig, LINEAR, {"r": 8, "save_projection": True}, refused={"r": 4}, harmless=LARGER),
    "vera, transposed": Case(VeraConfig, CONV1D, {"r": 8, "save_projection": True, "fan_in_fan_out": True}, harmless=LARGER),
}
