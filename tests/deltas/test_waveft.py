"""WaveFT against peft's own transform in float64, for every wavelet, sizes even and odd, and rows by themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import WaveFTConfig
from peft.tuners.waveft.layer import WaveFTLinear

from loratools.deltas.drawn import places
from loratools.deltas.shares import Shares
from loratools.deltas.waveft import WaveFT
from loratools.errors import OptionError, ShapeError
from loratools.linalg.wavelets import names
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


@pytest.mark.parametrize("wavelet", names())
@pytest.mark.parametrize("shape", [(24, 16), (21, 7)])
def test_it_is_pefts(wavelet: str, shape: tuple[int, int]) -> None:
    config = WaveFTConfig(wavelet_family=wavelet, random_loc_seed=5, scaling=3.0, init_weights=False)
    layer = WaveFTLinear(torch.nn.Linear(*shape[::-1]), "x", config, n_frequency=90).double()
    change, W = layer.get_delta_weight("x").detach(), randn(*shape, seed=0)
    delta = WaveFT(spectrum=to_ref(layer.waveft_spectrum["x"]), seed=5, scale=3.0, wavelet=wavelet)
    assert torch.allclose(applied(delta, W), W.double() + change, rtol=1e-12, atol=1e-12) and blocks_agree(delta, W)


@given(st.integers(1, 12), st.integers(1, 12), seeds)
def test_the_simplest_wavelet_by_hand(out: int, width: int, seed: int) -> None:
    """db1 doubles each coefficient's place: sums in the upper left quarter, differences elsewhere, all halved."""
    count = (out * width + 1) // 2
    S = torch.zeros(out + out % 2, width + width % 2, dtype=torch.float64)
    spectrum, where = randn(count, seed=seed).double(), places(seed, count, out, width)
    S[where // width, where % width] = spectrum
    (A, H), (V, D) = (half.tensor_split(2, dim=1) for half in S.tensor_split(2))
    corners = [A + H + V + D, A + H - V - D, A - H + V - D, A - H - V + D]
    change = torch.stack([torch.stack(corners[:2], -1), torch.stack(corners[2:], -1)], -2).transpose(1, 2).reshape(S.shape) / 2
    delta = WaveFT(spectrum=to_ref(spectrum), seed=seed, scale=1.0, wavelet="db1").fitted(Spec("F64", (out, width)))
    assert torch.allclose(applied(delta, torch.zeros(out, width)), change[:out, :width], rtol=1e-14, atol=1e-14)


def test_without_a_wavelet_the_spectrum_itself() -> None:
    delta, W = WaveFT(spectrum=to_ref(torch.tensor([2.0, 3.0])), seed=1, scale=5.0, wavelet=None), torch.zeros(3, 4)
    found = applied(delta, W).flatten()
    assert found[places(1, 2, 3, 4)].tolist() == [10.0, 15.0] and int((found != 0).sum()) == 2


def test_a_wavelet_that_is_not_known() -> None:
    with pytest.raises(OptionError, match="unknown wavelet: found db11"):
        applied(WaveFT(spectrum=to_ref(torch.ones(1)), seed=0, scale=1.0, wavelet="db11"), torch.zeros(3, 4))


def test_a_share_that_is_not_its_own() -> None:
    delta = WaveFT(spectrum=to_ref(torch.ones(6)), seed=0, scale=1.0, bank=Shares(seed=0, rank=4)).fitted(Spec("F32", (3, 4)))
    assert delta.draws is not None and delta.draws[1] == (3, 4)
    bank = delta.draws[0].sized([(3, 4), (2, 2)])
    assert delta.drawn(bank).bank == bank
    with pytest.raises(ShapeError, match="share of n_frequency for each layer: found 6, expected 4"):
        delta.drawn(Shares(seed=0, rank=4).sized([(3, 4), (3, 4)]))
