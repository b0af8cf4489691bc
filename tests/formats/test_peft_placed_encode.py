"""Coefficients, single places, biases, rows and whole tensors written from deltas alone, and what only a base or one config would say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.fourierft import FourierFT
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.deltas.rows import Rows
from loratools.deltas.shares import Shares
from loratools.deltas.sparse import Sparse
from loratools.deltas.summed import Sum
from loratools.deltas.waveft import WaveFT
from loratools.errors import LoratoolsError
from loratools.formats import encode
from loratools.formats.peft import decode
from loratools.tensors import to_ref
from tests.formats.matrix import Draw, check_same

D = Draw()
FOURIER = FourierFT(spectrum=D(5), seed=3, scale=2.0)
WAVE = WaveFT(spectrum=D(5), seed=3, scale=2.0, wavelet="db2")
PAIRS = to_ref(torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]))
SHIRA = Sparse(values=D(10), places=PAIRS)
SUPER = Sparse(values=D(3), places=to_ref(torch.tensor([5, 7, 23], dtype=torch.int32)))
LOW = LowRank(A=D(2, 4), B=D(6, 2), alpha=3.0, layer="linear")
SIZE = (6, 4)


def written(stated: dict[str, Any] | None = None, **deltas: Delta) -> tuple[dict[str, Any], set[str]]:
    adapter = Adapter({name.replace("__", "."): delta for name, delta in deltas.items()}, {"peft": stated or {}})
    made = encode(adapter, "peft")
    check_same(adapter, decode(made))
    return dict(made.config or {}), {key.removeprefix("base_model.model.") for key in made.tensors}


def test_coefficients() -> None:
    config, keys = written(a__q__weight=FOURIER, b__q__weight=FOURIER, a__k__weight=replace(FOURIER, spectrum=D(7)))
    assert keys == {f"{path}.fourierft_spectrum" for path in ("a.q", "b.q", "a.k")}
    assert config["n_frequency"] == 5 and config["n_frequency_pattern"] == {r"(?<=^a\.)k": 7}
    assert (config["random_loc_seed"], config["scaling"]) == (3, 2)
    config, _ = written(a__weight=WAVE, b__weight=WAVE, c__weight=replace(WAVE, spectrum=D(7)))
    assert config["n_frequency_pattern"] == {"^c": 7} and (config["wavelet_family"], config["use_idwt"]) == ("db2", True)
    config, _ = written({"peft_type": "WAVEFT", "wavelet_family": "sym2"}, a__weight=replace(WAVE, wavelet=None))
    assert (config["wavelet_family"], config["use_idwt"]) == ("sym2", False)
    config, _ = written(a__weight=replace(WAVE, bank=Shares(seed=3, rank=6)))
    assert (config["proportional_parameters"], config["n_frequency"]) == (True, 6)


def test_places() -> None:
    config, keys = written(a__weight=replace(SHIRA, size=SIZE))
    assert config["peft_type"] == "SHIRA" and config["r"] == 1 and keys == {"a.shira_weight", "a.shira_indices"}
    assert written({"peft_type": "SHIRA", "r": 4}, a__weight=SHIRA)[0]["r"] == 4
    config, _ = written(a__weight=replace(SUPER, size=SIZE))
    assert config["peft_type"] == "SUPERTUNING" and config["r"] is None and int(24 * (1 - config["sparsity"])) == 3
    config, keys = written({"peft_type": "SUPERTUNING", "sparsity": 0.875}, a__weight=Sum(parts=(SUPER, LOW)))
    assert (config["r"], config["lora_alpha"], config["sparsity"]) == (2, 3, 0.875) and "a.supertuning_lora_B.weight" in keys


def test_biases_alone_rows_and_norms() -> None:
    config, keys = written(a__bias=Full(diff=D(6)))
    assert config["peft_type"] == "BEFT" and keys == {"a.beft_bias"}
    rows = Rows(values=D(2, 4), indices=(3, 1))
    config, keys = written({"peft_type": "TRAINABLE_TOKENS"}, embed__weight=rows)
    assert config["peft_type"] == "TRAINABLE_TOKENS" and config["token_indices"] == [3, 1] and "modules_to_save" not in config
    config, _ = written({"peft_type": "TRAINABLE_TOKENS"}, embed__weight=rows, norm__weight=Replacement(value=D(4)))
    assert config["peft_type"] == "LORA" and config["trainable_token_indices"] == {"embed": [3, 1]}
    norm = Replacement(value=D(4), new=False, alike=True)
    config, keys = written(norm__weight=norm, norm__bias=norm)
    assert config["peft_type"] == "LN_TUNING" and keys == {"norm.ln_tuning_layers.weight", "norm.ln_tuning_layers.bias"}
    config, keys = written({"peft_type": "LN_TUNING", "target_modules": ["block"]}, x__block__norm__weight=norm)
    assert config["target_modules"] == ["x.block"] and keys == {"x.block.ln_tuning_layers.default.norm.weight"}


BASE = "give convert --base BASE"
REFUSED: dict[str, tuple[dict[str, Delta], str]] = {
    "two seeds": ({"a__weight": FOURIER, "b__weight": replace(FOURIER, seed=4)}, "one random_loc_seed for all modules"),
    "two wavelets": ({"a__weight": WAVE, "b__weight": replace(WAVE, wavelet="db1")}, "one wavelet_family for all modules"),
    "SHiRA without sizes": ({"a__weight": SHIRA}, rf"a\.weight: peft's SHiRA has .*whose sides only the base tells: found 10; {BASE}"),
    "another number than SHiRA's": ({"a__weight": replace(SHIRA, size=(6, 5))}, r"has r·\(in \+ out\) numbers for each weight: found 10"),
    "Super-Tuning without sizes": ({"a__weight": SUPER}, f"how many numbers there are, and only the base tells that; {BASE}"),
    "two shares": (
        {"a__weight": replace(SUPER, size=SIZE), "b__weight": replace(SUPER, size=(60, 40))}, "one share of each weight"
    ),
    "some with a LoRA": (
        {"a__weight": replace(SUPER, size=SIZE), "b__weight": Sum(parts=(replace(SUPER, size=SIZE), LOW))}, "peft has one r for all modules"
    ),
    "a bias scaled": ({"a__bias": Full(diff=D(6), scale=2.0)}, r"a\.bias: peft's BEFT has no scaling: found 2.0; rescale --bake"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit(case: str) -> None:
    deltas, said = REFUSED[case]
    with pytest.raises(LoratoolsError, match=said):
        written(**deltas)
