"""Places that no file holds: peft's own, for the same seed."""

from __future__ import annotations

import pytest
import torch
from peft import FourierFTConfig
from peft.tuners.fourierft.layer import FourierFTLinear

from loratools.deltas.drawn import places
from loratools.deltas.fourierft import FourierFT
from loratools.errors import ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref


@pytest.mark.parametrize("seed", [0, 777, 2**40])
def test_they_are_pefts(seed: int) -> None:
    layer = FourierFTLinear(torch.nn.Linear(13, 9), "x", FourierFTConfig(random_loc_seed=seed), n_frequency=50)
    rows, columns = layer.indices["x"]
    assert places(seed, 50, 9, 13).tolist() == (rows * 13 + columns).tolist()
    assert sorted(places(seed, 117, 9, 13).tolist()) == list(range(117))


def test_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="not a vector of coefficients"):
        FourierFT(spectrum=to_ref(torch.ones(2, 3)), seed=0, scale=1.0)
    delta = FourierFT(spectrum=to_ref(torch.ones(6)), seed=0, scale=1.0)
    assert delta.fits(Spec("F32", (2, 3))) and delta.fits(Spec("F32", (3, 2))) and not delta.fits(Spec("F32", (6,)))
    with pytest.raises(ShapeError, match="more coefficients than the weight has elements: found 6, expected at most 5"):
        delta.spec(Spec("F32", (5, 1)))
    assert delta.facts() == {"scaling": 1.0} and not delta.reproducible and delta.product() is None
