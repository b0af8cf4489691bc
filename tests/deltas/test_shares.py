"""Shares of coefficients: peft's own, for weights of all sizes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import WaveFTConfig, get_peft_model

from loratools.deltas.shares import Shares


@given(st.lists(st.tuples(st.integers(3, 12), st.integers(3, 12)), min_size=1, max_size=5), st.integers(1, 7))
def test_they_are_pefts(shapes: list[tuple[int, int]], mean: int) -> None:
    layers = torch.nn.ModuleDict({f"l{index}": torch.nn.Linear(width, out) for index, (out, width) in enumerate(shapes)})
    config = WaveFTConfig(n_frequency=mean, proportional_parameters=True, target_modules=list(layers))
    model = get_peft_model(layers, config)
    found = Shares(seed=0, rank=mean).sized(shapes)
    for index, shape in enumerate(shapes):
        assert found.of(*shape) == model.base_model.model[f"l{index}"].waveft_spectrum["default"].numel()
    assert found.sized([(1, 1)]) == found
