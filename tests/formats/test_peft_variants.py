"""Variants of LoRA: what their settings may be, which exclude each other, and factors brought into LoRA's own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import FormatError, LoratoolsError, ShapeError, UnsupportedError
from loratools.formats import load
from loratools.formats.peft_config import parse
from loratools.formats.peft_values import Values
from loratools.formats.peft_variants import SAMPLER, SAMPLES, SETTINGS, Variant, variant_of
from loratools.tensors import read_tensor, to_ref
from tests.files import peft_config, write_adapter
from tests.strategies import randn

ROOT = "base_model.model.q."
BLOCKS = {"target_modules_bd_a": ["o"], "target_modules_bd_b": ["q"], "nblocks": 2, "match_strict": True}
ASKED: dict[str, Any] = {
    "use_dora": True, "use_qalora": True, "use_bdlora": BLOCKS, "kasa_config": {"beta": 0.1, "gamma": 0.1},
    "velora_config": {"num_groups": 4, "scale": 1.0, "init_type": "random"}, "monteclora_config": {"num_samples": 8}, "enable_lora": [True],
}  # fmt: skip


def config(**more: Any) -> dict[str, Any]:
    return peft_config(target_modules=["q"], qalora_group_size=2) | more


@pytest.mark.parametrize("one", SETTINGS)
@pytest.mark.parametrize("other", [*SETTINGS, "init_lora_weights"])
def test_two_exclude_each_other(one: str, other: str) -> None:
    value = "mica" if other == "init_lora_weights" else ASKED[other]
    if one == other:
        assert parse(config(**{one: value})).r == 2
        return
    with pytest.raises(LoratoolsError, match="asks for two variants of LoRA, which peft refuses"):
        parse(config(**{one: ASKED[one], other: value}))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"use_qalora": "yes"}, "use_qalora: found 'yes', expected true or false"),
        ({"use_bdlora": True}, "use_bdlora: found True, expected a table of settings"),
        ({"kasa_config": [1]}, r"kasa_config: found \[1\], expected a table"),
        ({"use_bdlora": {**BLOCKS, "nblocks": 0}}, r"use_bdlora\.nblocks: found 0"),
        ({"use_bdlora": {**BLOCKS, "nblocks": None}}, r"use_bdlora\.nblocks: found None, expected a whole number"),
        ({"use_bdlora": {**BLOCKS, "match_strict": 1}}, r"use_bdlora\.match_strict: found 1, expected true or false"),
        ({"use_bdlora": {**BLOCKS, "target_modules_bd_a": [1]}}, r"use_bdlora\.target_modules_bd_a: found \[1\]"),
        ({"use_bdlora": {**BLOCKS, "new": 1}}, r"sets use_bdlora\.new, which this version does not know"),
        ({"use_bdlora": BLOCKS, "lora_bias": True}, "peft's block-diagonal layers have no bias"),
        ({"use_qalora": True, "lora_bias": True}, "peft's forward leaves the bias out"),
        ({"kasa_config": {"beta": 1, "new": 1}}, r"sets kasa_config\.new"),
        ({"velora_config": {"scale": 1.0}}, r"velora_config\.num_groups: found None"),
        ({"velora_config": {"num_groups": 4, "new": True}}, r"sets velora_config\.new"),
        ({"monteclora_config": {"num_samples": "8"}}, r"monteclora_config\.num_samples: found '8'"),
        ({"monteclora_config": {"num_samples": 8, "new": 0}}, r"sets monteclora_config\.new"),
        ({"enable_lora": [1, 0]}, r"enable_lora: found \[1, 0\]"),
        ({"enable_lora": [True], "alpha_pattern": {"q": 1}}, "peft 0.1 and 0.2, which have no such setting: found alpha_pattern"),
        ({"kasa_config": {"beta": 1}, "init_lora_weights": "olora"}, "init_lora_weights 'olora' beside a variant of LoRA"),
        ({"use_bdlora": BLOCKS, "init_lora_weights": "pissa"}, "init_lora_weights 'pissa' beside a variant of LoRA"),
        ({"kasa_config": {"beta": 1}, "target_parameters": ["x"]}, "target_parameters beside a variant of LoRA, which peft refuses"),
    ],
)
def test_settings_that_are_none(change: dict[str, Any], words: str) -> None:
    with pytest.raises(LoratoolsError, match=words):
        parse(config(**change))


def test_a_setting_that_is_off_is_no_variant() -> None:
    for name in SETTINGS:
        for value in (None, False, {}, []):
            assert variant_of(Values({name: value}, [])) == Variant()


def test_blocks_on_the_diagonal() -> None:
    variant = parse(config(use_bdlora=BLOCKS)).variant
    A, B = randn(4, 6, seed=1), randn(8, 2, seed=2)
    of_q, of_o = (variant.factors(path, to_ref(A), to_ref(B)) for path in ("q", "o"))
    assert torch.equal(read_tensor(of_q.B), torch.block_diag(B[:4], B[4:])) and torch.equal(read_tensor(of_q.A), A)
    assert torch.equal(read_tensor(of_o.A), torch.block_diag(A[:2], A[2:])) and torch.equal(read_tensor(of_o.B), B)
    assert (of_q.rank, of_q.times) == (4, 1.0)
    with pytest.raises(ShapeError, match=r"A has rows that are no multiple of nblocks: found \[3, 6\], expected 2"):
        variant.factors("o", to_ref(A[:3]), to_ref(B))
    with pytest.raises(FormatError, match="for both of its factors"):
        variant.factors("o.q", to_ref(A), to_ref(B))
    with pytest.raises(FormatError, match="for none of its factors, and match_strict is set"):
        variant.factors("k", to_ref(A), to_ref(B))
    loose = parse(config(use_bdlora={**BLOCKS, "match_strict": False})).variant.factors("k", to_ref(A), to_ref(B))
    assert torch.equal(read_tensor(loose.A), A) and torch.equal(read_tensor(loose.B), B)


def test_pooled_columns() -> None:
    variant = parse(config(use_qalora=True, qalora_group_size=3)).variant
    found = variant.factors("q", to_ref(A := randn(2, 4, seed=1)), to_ref(B := randn(5, 2, seed=2)))
    assert torch.equal(read_tensor(found.A), A.repeat_interleave(3, dim=1)) and torch.equal(read_tensor(found.B), B)
    assert (found.rank, found.times) == (2, pytest.approx(12 / 9))


def adapter(folder: Path, more: dict[str, torch.Tensor], **setting: Any) -> Path:
    tensors = {f"{ROOT}lora_A.weight": randn(2, 6, seed=1), f"{ROOT}lora_B.weight": randn(5, 2, seed=2)}
    return write_adapter(folder, tensors | {ROOT + key: tensor for key, tensor in more.items()}, config(**setting))


@pytest.mark.parametrize("slot", ["lora_diag", "lora_velora_embed", *(f"{SAMPLER}.{name}" for name in SAMPLES)])
def test_a_tensor_that_no_setting_asks_for(tmp_path: Path, slot: str) -> None:
    with pytest.raises(FormatError, match=f"{slot}: a tensor of a variant that the config does not ask for"):
        load(adapter(tmp_path, {slot: torch.ones(2)}))


def test_what_only_training_reads_is_named(tmp_path: Path) -> None:
    told = load(adapter(tmp_path / "one", {"lora_velora_embed": torch.ones(2)}, velora_config={"num_groups": 4})).notes
    assert [note for note in told if note == f"not needed, peft reads them while it trains: {ROOT}lora_velora_embed"]
    sampler = {f"{SAMPLER}.{name}": torch.ones(shape) for name, shape in zip(SAMPLES, [(2,), (8,), (2, 2), (8,)], strict=True)}
    told = load(adapter(tmp_path / "two", sampler, monteclora_config={"num_samples": 8})).notes
    assert any(SAMPLER in note and "(4 in all)" in note for note in told)


def test_a_sampler_may_not_be_made_yet_but_not_half_of_it(tmp_path: Path) -> None:
    """peft makes it in the first forward of a model that was loaded empty, so an adapter saved before has none."""
    assert load(adapter(tmp_path / "none", {}, monteclora_config={"num_samples": 8})).notes == ()
    with pytest.raises(FormatError, match=f"has no {SAMPLER}.expert_weights_prior beside it"):
        load(adapter(tmp_path / "half", {f"{SAMPLER}.std_prior": torch.ones(2)}, monteclora_config={"num_samples": 8}))
    with pytest.raises(FormatError, match="has no lora_velora_embed beside it"):
        load(adapter(tmp_path / "other", {}, velora_config={"num_groups": 4}))
    with pytest.raises(FormatError, match="has no lora_diag beside it"):
        load(adapter(tmp_path / "kasa", {}, kasa_config={"beta": 1}))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("use_dora", "enable_lora")])
def test_only_on_linear_layers(tmp_path: Path, name: str) -> None:
    conv = {f"{ROOT}lora_A.weight": randn(2, 6, 3, seed=1), f"{ROOT}lora_B.weight": randn(4, 2, 1, seed=2)}
    table = {f"{ROOT}lora_embedding_A": randn(2, 6, seed=1), f"{ROOT}lora_embedding_B": randn(4, 2, seed=2)}
    for number, tensors in enumerate((conv, table)):
        write_adapter(tmp_path / str(number), tensors, config(**{name: ASKED[name]}))
        with pytest.raises(UnsupportedError, match="on an embedding or a convolution, where peft has none"):
            load(tmp_path / str(number))


def test_kasa_beside_what_it_cannot_be_beside(tmp_path: Path) -> None:
    diag = {"lora_diag": torch.ones(2)}
    with pytest.raises(FormatError, match="a DoRA magnitude without use_dora"):
        load(adapter(tmp_path, diag | {"lora_magnitude_vector": torch.ones(5)}, kasa_config={"beta": 1}))
    from loratools.formats.base import ReadOptions

    with pytest.raises(UnsupportedError, match=r"KaSA on a weight stored \(in, out\), which peft refuses"):
        load(adapter(tmp_path / "turned", diag, kasa_config={"beta": 1}), options=ReadOptions(transposed=("q",)))
