"""Rows of peft's methods that read a whole weight: how many singular values a config keeps, scalings, layers that are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import FormatError, LoratoolsError, ShapeError, UnsupportedError
from loratools.formats import load
from tests.files import write_adapter

ROOT = "base_model.model.layers.3.x."


def deft(folder: Path, rank: int = 2, *, R: bool = True, **changes: Any) -> dict[str, Any]:
    tensors = {f"{ROOT}deft_P": torch.ones(5, rank)} | ({f"{ROOT}deft_R": torch.ones(rank, 7)} if R else {})
    config = {"peft_type": "DEFT", "target_modules": ["x"], "r": 2, "para": False, "alpha": None, "decomposition_method": "qr"}
    return load(write_adapter(folder, tensors, config | changes))["layers.3.x.weight"].facts()


def test_the_scaling_of_what_is_put_in(tmp_path: Path) -> None:
    for number, (alpha, scaling) in enumerate({None: 1.0, 0: 1.0, 6: 3.0, -1: -0.5}.items()):
        assert deft(tmp_path / str(number), alpha=alpha)["scaling"] == scaling
    assert deft(tmp_path / "wide", 5, r=9) == {"rank": 5, "scaling": 1.0}  # no more directions than outputs


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"r": 3}, ShapeError, "the rank is not the config's: found 2, expected 3"),
        ({"R": False}, FormatError, "has no deft_R beside it"),
        ({"para": True}, FormatError, "deft_R: not used by this method's formula"),
        ({"para": None}, FormatError, "para: found None, expected true or false"),
        ({"alpha": "6"}, FormatError, "alpha: found '6', expected a number"),
        ({"decomposition_method": "svd"}, FormatError, "decomposition_method: found 'svd', expected relu or qr"),
    ],
)
def test_a_projection_against_its_config(tmp_path: Path, changes: dict[str, Any], error: type[LoratoolsError], text: str) -> None:
    with pytest.raises(error, match=text):
        deft(tmp_path, **changes)


def osf(folder: Path, kept: int, **config: Any) -> None:
    count = 6 - kept
    parts = {"U": torch.ones(8, count), "S": torch.ones(count), "V": torch.ones(count, 6)}
    tensors = {f"{ROOT}osf_svd_params.{name}_low": part for name, part in parts.items()}
    load(write_adapter(folder, tensors, {"peft_type": "OSF", "target_modules": ["x"], **config}))


@pytest.mark.parametrize(
    ("kept", "config"),
    [
        (3, {}), (3, {"effective_rank": None}), (2, {"effective_rank": 2}), (6, {"effective_rank": 99}), (4, {"effective_rank": 0.7}),
        (6, {"effective_rank": 1.0}), (1, {"effective_rank": 1}), (2, {"effective_rank": 2.9}),
        (5, {"effective_rank": 2, "rank_pattern": {"ayers": 5, "x": 1}}), (2, {"effective_rank": 2, "rank_pattern": {"^x": 5}}),
        (3, {"effective_rank": 2, "rank_pattern": {r"3\.x$": 0.5, "x": 1}}),
    ],
)  # fmt: skip
def test_how_many_singular_values_a_config_keeps(tmp_path: Path, kept: int, config: dict[str, Any]) -> None:
    """`tuners/osf/model.py::_resolve_rank`; patterns are searched for anywhere in the path, unlike those of other methods."""
    osf(tmp_path / "good", kept, **config)
    with pytest.raises(ShapeError, match=rf"not as many singular values are kept as the config says: found {kept - 1}, expected {kept}"):
        osf(tmp_path / "bad", kept - 1, **config)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"effective_rank": "3"}, "effective_rank: found '3', expected a rank or a share of one"),
        ({"effective_rank": True}, "effective_rank: found True"),
        ({"rank_pattern": [3]}, r"rank_pattern: found \[3\], expected regular expressions mapped to ranks"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: not a regular expression"),
    ],
)
def test_what_is_no_rank(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        osf(tmp_path, 3, **config)


def peanut(folder: Path, encoders: int, decoders: int, **changes: Any) -> dict[str, Any]:
    counts = {"encoders": encoders, "decoders": decoders}
    inner = {f"{ROOT}peanut_{side}.{i}.weight": torch.ones(2, 2) for side, count in counts.items() for i in range(count)}
    tensors = inner | {f"{ROOT}peanut_A.weight": torch.ones(2, 5), f"{ROOT}peanut_B.weight": torch.ones(5, 2)}
    config = {"peft_type": "PEANUT", "target_modules": ["x"], "r": 2, "depth": 1, "act_fn": "relu", "scaling": 1.5}
    return load(write_adapter(folder, tensors, config | changes))["layers.3.x.weight"].facts()


@pytest.mark.parametrize(
    ("encoders", "decoders", "changes", "error", "text"),
    [
        (1, 0, {}, FormatError, r"has no peanut_decoders\.0\.weight beside it"),
        (2, 2, {}, LoratoolsError, r"peanut_encoders\.1\.weight: not used by this method's formula"),
        (1, 1, {"r": 3}, ShapeError, "the rank is not the config's: found 2, expected 3"),
        (1, 1, {"act_fn": None}, FormatError, "act_fn: found None, expected an activation's name"),
        (1, 1, {"act_fn": "prelu"}, UnsupportedError, "the activation prelu has parameters that the adapter does not save"),
        (1, 1, {"scaling": None}, FormatError, "adapter_config.json lacks scaling"),
    ],
)  # fmt: skip
def test_a_network_against_its_config(
    tmp_path: Path, encoders: int, decoders: int, changes: dict[str, Any], error: type[LoratoolsError], text: str
) -> None:
    assert peanut(tmp_path / "good", 1, 1) == {"rank": 2, "scaling": 1.5}
    with pytest.raises(error, match=text):
        peanut(tmp_path / "bad", encoders, decoders, **changes)
