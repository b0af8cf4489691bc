"""Rows of peft's rotations: what files of older releases meant, and what a config says against its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.deltas.laid import Unsettled
from loratools.deltas.rotated import Rotated
from loratools.errors import FormatError, LoratoolsError, ShapeError, UnsupportedError
from loratools.formats import load
from loratools.formats.peft_turned_encode import divisor
from tests.deltas.apply import applied
from tests.files import write_adapter
from tests.strategies import randn

ROOT = "base_model.model.x."
NUMBERS = 0.3 * randn(3, 6, seed=0)
OFT: dict[str, Any] = {
    "peft_type": "OFT", "target_modules": ["x"], "r": 0, "oft_block_size": 4, "coft": False, "eps": 6e-5, "block_share": False,
    "use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "peft_version": "0.21.2",
}  # fmt: skip
BOFT: dict[str, Any] = {
    "peft_type": "BOFT", "target_modules": ["x"], "boft_block_size": 2, "boft_block_num": 0, "boft_n_butterfly_factor": 1,
}  # fmt: skip


def rotation(folder: Path, **changes: Any) -> Rotated:
    tensors = {f"{ROOT}oft_R.weight": changes.pop("numbers", NUMBERS)}
    config = {name: value for name, value in (OFT | changes).items() if value is not ...}
    delta = load(write_adapter(folder, tensors, config))["x.weight"]
    assert isinstance(delta, Unsettled) and delta.transposed is False and isinstance(delta.delta, Rotated)
    return delta.delta


@pytest.mark.parametrize(
    ("version", "last"),
    [(..., 2.0), ("0.17.1", 2.0), ("0.18.0.dev0@abc", 2.0), ("0.18.0rc1", 2.0), ("0.18.0", 1.0), ("0.18.1.dev0", 1.0), ("1.0.0", 1.0)],
)
def test_the_last_power_counted_twice_before_peft_0_18(tmp_path: Path, version: Any, last: float) -> None:
    """`tuners/oft/layer.py::_cayley_batch` of 0.16.0, 0.17.1 and 0.18.0; peft reads older files as newer ones, with a warning."""
    found = rotation(tmp_path, peft_version=version)
    Q = torch.zeros(3, 4, 4, dtype=torch.float64)
    Q[:, *torch.triu_indices(4, 4, 1)] = NUMBERS.double()
    Q = Q - Q.transpose(1, 2)
    R = torch.eye(4, dtype=torch.float64) + 2 * (Q + Q @ Q + Q @ Q @ Q) + last * Q @ Q @ Q @ Q
    W = randn(5, 12, seed=1)
    assert torch.allclose(applied(found, W), W.double() @ torch.block_diag(*R).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("terms", "new", "old"), [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 3, 2), (4, 3, 3), (5, 4, 4)])
def test_how_many_powers_there_are(tmp_path: Path, terms: int, new: int, old: int) -> None:
    assert rotation(tmp_path / "new", num_cayley_neumann_terms=terms).degree == new
    assert rotation(tmp_path / "old", num_cayley_neumann_terms=terms, peft_version="0.16.0").degree == old


def test_a_bound_is_shared_out_among_the_blocks(tmp_path: Path) -> None:
    assert rotation(tmp_path / "a", coft=True, eps=0.9).bound == pytest.approx(0.9 / 3**0.5)
    assert rotation(tmp_path / "b").bound is None


def test_blocks_of_the_nearest_size_that_divides(tmp_path: Path) -> None:
    assert rotation(tmp_path / "a", oft_block_size=5).extent() == 12
    assert rotation(tmp_path / "b", oft_block_size=0, r=3).extent() == 12
    assert [divisor(12, wanted) for wanted in (1, 5, 8, 9, 10, 11, 12, 40)] == [1, 4, 6, 6, 12, 12, 12, 12]


FAULTS: dict[str, tuple[dict[str, Any], type[LoratoolsError], str]] = {
    "no block size": ({"oft_block_size": ...}, UnsupportedError, "up to 0.15.2, with oft_r: another.*merge it with the peft"),
    "both": ({"r": 3}, FormatError, "number and size of blocks: found r 3, oft_block_size 4, expected one of them, the other 0"),
    "neither": ({"oft_block_size": 0}, FormatError, "number and size of blocks"),
    "below nothing": ({"r": -1, "oft_block_size": 0}, FormatError, "number and size of blocks"),
    "another size": ({"oft_block_size": 2}, ShapeError, "the blocks are not as large as the config says: found 4, expected 2"),
    "another number": ({"r": 4, "oft_block_size": 0}, ShapeError, "the blocks are not as many as the config says: found 3, expected 4"),
    "no terms": ({"num_cayley_neumann_terms": ...}, FormatError, "adapter_config.json lacks num_cayley_neumann_terms"),
    "no word on the series": ({"use_cayley_neumann": ...}, FormatError, "use_cayley_neumann: found None, expected true or false"),
    "no blocks": ({"numbers": torch.ones(3, 5)}, ShapeError, "makes no square blocks"),
    "several that are shared": ({"block_share": True}, ShapeError, "one block is shared by all"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_config_against_its_tensors(tmp_path: Path, fault: str) -> None:
    changes, error, text = FAULTS[fault]
    with pytest.raises(error, match=text):
        rotation(tmp_path, **changes)


@pytest.mark.parametrize("scaled", [False, True])
def test_oft_of_peft_0_15_is_refused_by_name(tmp_path: Path, scaled: bool) -> None:
    tensors = {f"{ROOT}oft_r": torch.ones(3, 4, 4)} | ({f"{ROOT}oft_s": torch.ones(5, 1)} if scaled else {})
    with pytest.raises(UnsupportedError, match=r"x\.oft_r: OFT as peft wrote it up to 0\.15\.2, with oft_r"):
        load(write_adapter(tmp_path, tensors, OFT))


def boft(folder: Path, factors: int, **changes: Any) -> Any:
    tensors = {f"{ROOT}boft_R": torch.ones(factors, 6, 2, 2), f"{ROOT}boft_s": changes.pop("scale", torch.ones(5, 1))}
    return load(write_adapter(folder, tensors, BOFT | changes))["x.weight"]


def test_one_factor_is_what_peft_makes_without_its_cuda_extension(tmp_path: Path) -> None:
    assert boft(tmp_path / "1", 1, boft_n_butterfly_factor=2).refs()["numbers"].spec.shape == (1, 6, 2, 2)
    assert boft(tmp_path / "2", 2, boft_n_butterfly_factor=2).refs()["numbers"].spec.shape == (2, 6, 2, 2)


@pytest.mark.parametrize(
    ("factors", "changes", "text"),
    [
        (2, {}, "not as many factors as the config says: found 2, expected 1"),
        (1, {"boft_n_butterfly_factor": 0}, "not as many factors as the config says: found 1, expected 0"),
        (1, {"boft_block_size": 4}, "the blocks are not the config's: found 6 blocks of 2, expected boft_block_num 0, boft_block_size 4"),
        (1, {"boft_block_num": 6}, "the blocks are not the config's"),
        (1, {"scale": torch.ones(5)}, r"boft_s is no vector along an axis: found \[5\]"),
    ],
)
def test_a_butterfly_against_its_config(tmp_path: Path, factors: int, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ShapeError, match=text):
        boft(tmp_path, factors, **changes)


def test_a_reflections_rank(tmp_path: Path) -> None:
    config = {"peft_type": "HRA", "target_modules": ["x"], "r": 2, "apply_GS": False}
    assert load(write_adapter(tmp_path / "good", {f"{ROOT}hra_u": torch.ones(4, 2)}, config))["x.weight"].facts() == {"rank": 2}
    with pytest.raises(ShapeError, match="the rank is not the config's: found 3, expected 2"):
        load(write_adapter(tmp_path / "bad", {f"{ROOT}hra_u": torch.ones(4, 3)}, config))
