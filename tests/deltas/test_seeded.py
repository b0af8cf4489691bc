"""Banks drawn from a seed: peft's own numbers, for sizes that all layers decide."""

from __future__ import annotations

import math
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from loratools.deltas.seeded import Bases, Projections, normal
from loratools.deltas.vera import VeRA
from loratools.errors import UnsupportedError
from loratools.refs import Spec
from loratools.resolution import with_banks
from loratools.tensors import to_ref
from loratools.threads import single_threaded_blas
from tests.strategies import randn


def of_peft(config: type[Any], names: tuple[str, str], **settings: Any) -> tuple[Tensor, Tensor]:
    """The A and B that peft makes for layers of (40, 24) and (30, 50)."""
    layers = nn.ModuleDict({"x": nn.Linear(24, 40), "y": nn.Linear(50, 30)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(layers, config(r=7, target_modules=["x", "y"], projection_prng_key=5, **settings))
    A, B = (getattr(model.base_model, name)["default"] for name in names)
    return A, B


SHAPES = [(40, 24), (30, 50)]


@pytest.mark.parametrize("parts, config, word", [(1, peft.VeraConfig, "vera"), (2, peft.PveraConfig, "pvera")])
def test_projections_are_those_of_peft(parts: int, config: type[Any], word: str) -> None:
    found = Projections(seed=5, rank=7, parts=parts).sized(SHAPES).tensors
    expected = of_peft(config, (f"{word}_A", f"{word}_B"))
    assert [tuple(tensor.shape) for tensor in found] == [(7 * parts, 50), (40, 7)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("settings", [{}, {"sparse": True}, {"very_sparse": True}, {"sparse": True, "very_sparse": True}], ids=str)
def test_bases_are_those_of_peft(settings: dict[str, bool]) -> None:
    found = Bases(seed=5, rank=7, **settings).sized(SHAPES).tensors
    expected = of_peft(peft.RandLoraConfig, ("randlora_A", "randlora_B"), **settings)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        # in bfloat16 the same bits; in float32 peft's standard deviation is summed in an order of its own
        assert torch.equal(one.float(), other) if not settings else torch.allclose(one, other, rtol=3e-7, atol=0)
    assert found[0].dtype == (torch.float32 if settings else torch.bfloat16)


def test_bases_do_not_depend_on_threads() -> None:
    sizes = [(600, 600)]
    with single_threaded_blas():
        alone = Bases(seed=0, rank=16, sparse=True).sized(sizes).tensors
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        together = Bases(seed=0, rank=16, sparse=True).sized(sizes).tensors
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_dense_bases_have_a_deviation_of_one() -> None:
    for tensor in Bases(seed=1, rank=8).sized([(64, 48)]).tensors:
        assert float(tensor.double().std()) == pytest.approx(1, abs=2**-7)


def test_normal_projections_are_those_of_peft() -> None:
    layers = nn.ModuleDict({name: nn.Linear(9, 8) for name in "xyz"})
    model = peft.get_peft_model(layers, peft.TinyLoraConfig(r=3, u=11, target_modules=["x", "y", "z"], projection_seed=6))
    for number, name in enumerate("xyz"):
        assert torch.equal(normal(6 + number, 11, 3), getattr(model.base_model.model, name).tinylora_P["default"])


def test_every_layer_takes_a_part_of_one_bank() -> None:
    bank = Projections(seed=0, rank=2)
    deltas = {
        f"{out}": VeRA(b=to_ref(randn(out, seed=0)), d=to_ref(randn(2, seed=1)), bank=bank).fitted(Spec("F32", (out, width)))
        for out, width in SHAPES
    }
    other = VeRA(b=to_ref(randn(9, seed=0)), d=to_ref(randn(2, seed=1)), bank=Projections(seed=1, rank=2)).fitted(Spec("F32", (9, 99)))
    found = with_banks({**deltas, "9": other})
    banks = [delta.draws[0] for delta in found.values() if delta.draws]
    assert banks[0] is banks[1] and (banks[0].out, banks[0].width) == (40, 50) and (banks[2].out, banks[2].width) == (9, 99)
    assert banks[0].tensors[0] is banks[0].tensors[0]  # drawn once
    assert with_banks({}) == {}


def test_without_a_base_nothing_is_drawn() -> None:
    delta = VeRA(b=to_ref(randn(9, seed=0)), d=to_ref(randn(2, seed=1)), bank=Projections(seed=0, rank=2))
    assert delta.shape() == (9,) and delta.fits(Spec("F32", (9, 5))) and not delta.fits(Spec("F32", (8, 5)))
    with pytest.raises(UnsupportedError, match="only the base tells; give its base"):
        delta.product()
    assert math.isfinite(with_banks({"x": delta.fitted(Spec("F32", (9, 5)))})["x"].norm())
