"""(IA)³, OFT and BOFT as peft has them: shapes, the settings that all modules share, and what peft does otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.butterfly import Butterfly
from loratools.deltas.rotated import Rotated
from loratools.deltas.scaled import Scaled
from loratools.errors import LoratoolsError
from loratools.formats import encode
from loratools.formats.peft import decode
from loratools.tensors import read_tensor, to_ref
from tests.formats.matrix import Draw, check_same, near_one

D = Draw()
L = near_one(D, 4)
INPUTS = Rotated(numbers=D(2, 3), pointwise=True)
TABLE = Rotated(numbers=D(2, 3), pointwise=True, factor=-1.0)
TURNS = Butterfly(numbers=D(1, 2, 2, 2), scale=D(6, 1), factor=0.5)


def written(**deltas: Delta) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config and the shapes of what is written, which reads as the same again."""
    adapter = Adapter({name.replace("__", "."): delta for name, delta in deltas.items()})
    made = encode(adapter, "peft")
    check_same(adapter, Adapter({name: delta for name, delta in decode(made).items() if name in adapter}))
    return dict(made.config or {}), {key.removeprefix("base_model.model."): ref.spec.shape for key, ref in made.tensors.items()}


def test_numbers_of_inputs_and_of_outputs() -> None:
    config, shapes = written(a__weight=Scaled(l=L, axis=1), b__weight=Scaled(l=L), b__bias=Scaled(l=L))
    assert shapes == {"a.ia3_l": (1, 4), "b.ia3_l": (4, 1)} and config["feedforward_modules"] == ["a"]
    assert written(c__weight=Scaled(l=L.reshape(1, 4, 1, 1), axis=1))[1] == {"c.ia3_l": (1, 4, 1, 1)}


def test_paths_that_end_alike_are_selected_in_full() -> None:
    config, _ = written(fc__weight=Scaled(l=L, axis=1), x_fc__weight=Scaled(l=L), x_fc__bias=Scaled(l=L))
    assert config["feedforward_modules"] == "fc" and config["target_modules"] == ["fc", "x_fc"]  # of a list any ending would do


def test_told_from_1_they_become_factors_where_nothing_is_rounded() -> None:
    l = to_ref(torch.tensor([0.5, -0.25, 0.0, 2.0], dtype=torch.bfloat16))  # noqa: E741
    made = encode(Adapter({"a.weight": Scaled(l=l, axis=1, offset=1.0)}), "peft").tensors["base_model.model.a.ia3_l"]
    assert read_tensor(made).tolist() == [[1.5, 0.75, 1.0, 3.0]]


@pytest.mark.parametrize("series", [(None, 2.0), (0, 2.0), (1, 2.0), (3, 1.0), (4, 1.0)])
def test_rotations_with_all_their_settings(series: tuple[int | None, float]) -> None:
    degree, last = series
    factor = 1.0 if degree is None else -1.0
    config, shapes = written(a__weight=replace(INPUTS, degree=degree, last=last, factor=factor, bound=0.25))
    assert shapes == {"a.oft_R.weight": (2, 3)} and (config["r"], config["oft_block_size"], config["coft"]) == (0, 3, True)
    assert config["use_cayley_neumann"] is (degree is not None) and config["bias"] == "none"
    _, shapes = written(a__weight=replace(TABLE, degree=degree, last=last, factor=-factor))
    assert shapes == {"a.oft_embedding_R.weight": (2, 3)}


def test_blocks_of_one_size_or_as_many() -> None:
    config, _ = written(a__weight=INPUTS, b__weight=Rotated(numbers=D(2, 6), pointwise=True))
    assert (config["r"], config["oft_block_size"]) in ((2, 0), (0, 3), (0, 4))  # of 6 and 8 inputs 3 comes to 3 and 4
    config, _ = written(a__weight=replace(INPUTS, numbers=D(1, 3), shared=True))
    assert config["block_share"] is True and config["oft_block_size"] == 3
    config, shapes = written(a__weight=TURNS, b__weight=Butterfly(numbers=D(1, 2, 3, 3), scale=D(6, 1), factor=0.5))
    assert (config["boft_block_num"], config["boft_block_size"]) == (2, 0) and shapes["b.boft_R"] == (1, 2, 3, 3)


KEEPS = "convert it first: --kind lora, or --format loratools keeps it"
ALIKE = Scaled(l=L)
REFUSED: dict[str, tuple[dict[str, Delta], str]] = {
    "outputs without their bias": ({"a__weight": ALIKE}, "multiplies its bias too, and this does not"),
    "outputs with another bias": ({"a__weight": ALIKE, "a__bias": Scaled(l=D(4))}, "multiplies its bias too, and this does not"),
    "inputs and a bias": ({"a__weight": Scaled(l=L, axis=1), "a__bias": ALIKE}, "of a layer's inputs leaves its bias as it is"),
    "outputs turned": ({"a__weight": replace(INPUTS, side="out")}, "turns a layer's inputs, each block bounded by itself"),
    "whole blocks": ({"a__weight": Rotated(numbers=D(2, 3, 3), pointwise=True)}, "what stands above the diagonals of its blocks"),
    "an older series": ({"a__weight": replace(INPUTS, factor=-1.0, degree=4)}, "a series that peft 0.21.2 sums otherwise: found degree 4"),
    "some blocks shared": (
        {"a__weight": INPUTS, "b__weight": replace(INPUTS, numbers=D(1, 3), shared=True)}, "one block_share for all modules: found True",
    ),
    "bounds of no one eps": (
        {"a__weight": replace(INPUTS, bound=0.1), "b__weight": replace(INPUTS, bound=0.2)}, "of one eps, and these are of none",
    ),
    "blocks that differ": (
        {"a__weight": TURNS, "b__weight": Butterfly(numbers=D(1, 3, 3, 3), scale=D(6, 1), factor=0.5)}, "one boft_block_size for all",
    ),
    "a butterfly without a scale": ({"a__weight": replace(TURNS, scale=None)}, "half a block changing places at a time"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_does_otherwise(case: str) -> None:
    deltas, said = REFUSED[case]
    with pytest.raises(LoratoolsError, match=said) as caught:
        written(**deltas)
    assert KEEPS in str(caught.value) and (".weight: " in str(caught.value))


def test_a_bias_alone() -> None:
    with pytest.raises(LoratoolsError, match=r"peft's \(IA\)³ changes no bias alone"):
        written(a__weight=Scaled(l=L, axis=1), b__bias=ALIKE)
