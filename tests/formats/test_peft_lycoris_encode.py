"""LoHa and LoKr as peft lays them out: ranks, alphas, cores, and the one factor by which it cuts all weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lokr.layer import factorization as theirs

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.loha import LoHa
from loratools.deltas.lokr import LoKr
from loratools.errors import LoratoolsError
from loratools.formats import encode
from loratools.formats.peft import decode
from loratools.formats.peft_lycoris_encode import factorization
from tests.formats.matrix import Draw, check_same, loha, lokr

D = Draw()


def config_of(**deltas: Delta) -> dict[str, Any]:
    """The config of what is written, which reads as the same again."""
    adapter = Adapter({f"m.{name}.weight": delta for name, delta in deltas.items()})
    written = encode(adapter, "peft")
    check_same(adapter, decode(written))
    return dict(written.config or {})


@given(st.integers(1, 3000), st.one_of(st.just(-1), st.integers(1, 70)))
def test_sides_are_cut_as_peft_cuts_them(size: int, factor: int) -> None:
    assert factorization(size, factor) == theirs(size, factor)


def test_ranks_and_alphas_have_their_exceptions() -> None:
    other = LoHa(w1_a=D(6, 3), w1_b=D(3, 4), w2_a=D(6, 3), w2_b=D(3, 4), scale=1.0)
    config = config_of(a=loha(D, "linear"), b=loha(D, "linear"), c=other)
    assert (config["r"], config["rank_pattern"], config["alpha"], config["alpha_pattern"]) == (2, {r"^m\.c": 3}, 3, {})
    config = config_of(a=loha(D, "linear"), c=replace(other, scale=0.5))
    assert config["alpha_pattern"] == {r"^m\.a": 3} and config["alpha"] == 1.5


def test_cores() -> None:
    cored = LoHa(w1_a=D(2, 6), w1_b=D(2, 4), w2_a=D(2, 6), w2_b=D(2, 4), t1=D(2, 2, 3), t2=D(2, 2, 3), scale=1.0)
    assert config_of(a=cored)["use_effective_conv2d"] is True
    assert encode(Adapter({"a.weight": cored}), "peft").tensors["base_model.model.a.hada_t1"].spec.shape == (2, 2, 3, 1)
    assert config_of(a=LoKr(w1=D(2, 2), w2_a=D(1, 3), w2_b=D(1, 2), t2=D(1, 1, 3, 3), scale=1.0))["use_effective_conv2d"] is True


def test_factors_of_a_kronecker_product() -> None:
    config = config_of(a=lokr(D, "linear"))
    assert (config["decompose_both"], config["decompose_factor"], config["r"], config["alpha"]) == (False, -1, 1, 3)
    wide = LoKr(w1=D(4, 4), w2_a=D(8, 2), w2_b=D(2, 16), scale=1.0)  # of 32 by 64: near the roots it were 4·8 and 8·8
    assert config_of(a=wide)["decompose_factor"] == 4
    both = LoKr(w1_a=D(8, 2), w1_b=D(2, 8), w2_a=D(8, 2), w2_b=D(2, 8), scale=1.0)
    assert config_of(a=both)["decompose_both"] is True
    whole = LoKr(w1=D(2, 2), w2=D(3, 2), scale=1.0, alpha=None)
    assert (config_of(a=whole)["r"], config_of(a=whole)["alpha"]) == (2, 2)  # a rank from which peft makes w2 whole
    assert config_of(a=replace(whole, alpha=5.0))["r"] == 5
    assert config_of(a=LoKr(w1=D(2, 2), w2=D(3, 2, 3), scale=1.0, exchanged=True))["r"] == 2


KEEPS = "convert it first: --kind lora, or --format loratools keeps it"
REFUSED: dict[str, tuple[dict[str, Delta], str]] = {
    "two ranks of LoHa": (
        {"a": LoHa(w1_a=D(6, 3), w1_b=D(3, 4), w2_a=D(6, 2), w2_b=D(2, 4), scale=1.0)}, "one rank for both of its products: found 3 and 2",
    ),
    "one core": (
        {"a": LoHa(w1_a=D(2, 6), w1_b=D(2, 4), t1=D(2, 2, 1, 1), w2_a=D(6, 2), w2_b=D(2, 4), scale=1.0)},
        "a core for both of its products or for none",
    ),
    "a core of three axes": (
        {"a": LoKr(w1=D(2, 2), w2_a=D(1, 3), w2_b=D(1, 2), t2=D(1, 1, 3, 3, 3), scale=1.0)}, "no cores of such kernels: found",
    ),
    "cut by no factor": ({"a": LoKr(w1=D(2, 4), w2=D(16, 8), scale=1.0)}, r"one decompose_factor.*found \(2·16, 4·8\)"),
    "cut by two": (
        {"a": LoKr(w1=D(2, 2), w2=D(32, 32), scale=1.0), "b": LoKr(w1=D(4, 4), w2=D(16, 16), scale=1.0)}, "by one decompose_factor",
    ),
    "a Conv1d": ({"a": LoKr(w1=D(2, 2), w2=D(3, 2, 3), scale=1.0)}, "indices of a Conv1d's whole second factor before those of the first"),
    "a Conv2d": ({"a": LoKr(w1=D(2, 2), w2=D(3, 2, 3, 3), scale=1.0, exchanged=True)}, r"of others after them: found \[3, 2, 3, 3\]"),
    "a Conv3d": ({"a": LoKr(w1=D(2, 2), w2=D(3, 2, 3, 3, 3), scale=1.0)}, "peft has no LoKr of a Conv3d"),
    "two ranks of LoKr": (
        {"a": LoKr(w1_a=D(8, 1), w1_b=D(1, 8), w2_a=D(8, 2), w2_b=D(2, 8), scale=1.0)}, "one rank for both of its factors: found 1 and 2",
    ),
    "a product that peft has whole": (
        {"a": LoKr(w1=D(2, 2), w2_a=D(3, 2), w2_b=D(2, 2), scale=1.0)}, "at this rank and size peft makes w2 whole: found rank 2",
    ),
    "a whole that peft has as a product": (
        {"a": LoKr(w1_a=D(8, 2), w1_b=D(2, 8), w2=D(8, 8), scale=1.0)}, "at this rank and size peft makes w2 a product: found rank 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_makes_otherwise(case: str) -> None:
    deltas, said = REFUSED[case]
    with pytest.raises(LoratoolsError, match=said) as caught:
        config_of(**deltas)
    assert "m.a.weight: " in str(caught.value) and KEEPS in str(caught.value)
