"""Methods whose layers share tensors, written from deltas alone: the shared ones once, drawn ones not at all, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.randlora import RandLoRA
from loratools.deltas.seeded import Bases, Projections
from loratools.deltas.unilora import UniLoRA
from loratools.deltas.vblora import VBLoRA
from loratools.deltas.vera import PVeRA, VeRA
from loratools.errors import LoratoolsError
from loratools.formats import encode
from loratools.formats.peft import decode
from loratools.tensors import to_ref
from tests.formats.matrix import Draw, check_same

D = Draw()
A, B = D(3, 4), D(6, 3)
VERA = VeRA(b=D(6), d=D(3), A=A, B=B)
BANK = Projections(seed=5, rank=3)
DRAWN = VeRA(b=D(6), d=D(3), bank=BANK)
BASES = D(2, 1, 4), D(6, 2, 2)
RANDLORA = RandLoRA(lambdas=D(2, 2), gamma=D(2, 4), scale=1.5, A=BASES[0], B=BASES[1])
VECTORS = D(5, 2)
VBLORA = VBLoRA(vectors=VECTORS, topk=2, logits_a=D(2, 2, 5), logits_b=D(3, 2, 5))
PLACES = to_ref(torch.tensor([[0, 2, 1, 0], [1, 1, 0, 2]]))
ZEROS = to_ref(torch.zeros(3, 2, 1, dtype=torch.uint8))
UNILORA = UniLoRA(theta=D(3), indices_a=PLACES, scales_a=D(2, 4), indices_b=to_ref(torch.zeros(6, 2, dtype=torch.int64)), scales_b=D(6, 2))


def written(**deltas: Delta) -> tuple[dict[str, Any], set[str]]:
    adapter = Adapter({f"{path}.weight": delta for path, delta in deltas.items()})
    made = encode(adapter, "peft")
    check_same(adapter, decode(made))
    return dict(made.config or {}), {key.removeprefix("base_model.") for key in made.tensors}


def test_shared_tensors_once() -> None:
    config, keys = written(a=VERA, b=replace(VERA, b=D(6), d=D(3)))
    own = {f"model.{path}.vera_lambda_{side}" for path in "ab" for side in "bd"}
    assert keys == {"vera_A", "vera_B"} | own
    assert (config["r"], config["save_projection"], config["projection_prng_key"]) == (3, True, 0)
    config, keys = written(a=PVeRA(b=D(6), d=D(4), A=D(4, 4), B=D(6, 2)))
    assert config["peft_type"] == "PVERA" and config["r"] == 2 and {"pvera_A", "pvera_B"} < keys


def test_what_was_left_to_be_drawn_is_left() -> None:
    config, keys = written(a=DRAWN)
    assert keys == {"model.a.vera_lambda_b", "model.a.vera_lambda_d"}
    assert (config["save_projection"], config["projection_prng_key"]) == (False, 5)
    sparse = RandLoRA(lambdas=D(2, 2), gamma=D(2, 4), scale=1.5, bank=Bases(seed=7, rank=2, sparse=True))
    config, keys = written(a=sparse)
    assert (config["sparse"], config["very_sparse"], config["randlora_alpha"], len(keys)) == (True, False, 3, 2)


def test_copies_under_each_module_of_bases_that_are_shared() -> None:
    """peft looks for them there, and fails to find them where a file has them once."""
    _, keys = written(a=replace(RANDLORA, copy_a=BASES[0], copy_b=BASES[1]))
    assert {"randlora_A", "randlora_B", "model.a.randlora_A", "model.a.randlora_B"} < keys
    assert {key.removeprefix("base_model.") for key in encode(Adapter({"a.weight": RANDLORA}), "peft").tensors} == keys


def test_mixtures_and_indices() -> None:
    config, keys = written(a=VBLORA)
    assert (config["num_vectors"], config["vector_length"], config["topk"], config["r"]) == (5, 2, 2, 2)
    assert config["save_only_topk_weights"] is False and "vblora_vector_bank" in keys
    config, _ = written(a=UNILORA)
    assert (config["theta_d_length"], config["save_indices"], config["r"]) == (3, True, 2)


LARGE = replace(BANK, out=8, width=9)
REFUSED: dict[str, tuple[dict[str, Delta], str]] = {
    "another A": ({"a": VERA, "b": replace(VERA, A=D(3, 4))}, r"b\.weight: peft has one vera_A for all modules: found another than a has"),
    "some drawn": ({"a": VERA, "b": DRAWN}, "peft has one save_projection for all modules"),
    "two seeds": ({"a": DRAWN, "b": replace(DRAWN, bank=replace(BANK, seed=6))}, "one projection_prng_key for all modules"),
    "drawn for larger layers": (
        {"a": replace(DRAWN, bank=LARGE, width=4)}, r"a\.weight: its projections were drawn for larger layers.*\[6, 4\], expected \[8, 9\]"
    ),
    "larger than any layer": ({"a": replace(VERA, B=D(7, 3))}, r"as large as its largest layer, and these are larger: found \[7, 4\]"),
    "wider than any layer": ({"a": replace(VERA, A=D(3, 5), width=4)}, r"these are larger: found \[6, 5\], expected \[6, 4\]"),
    "logits of one side": (
        {"a": VBLoRA(vectors=VECTORS, topk=1, logits_a=D(2, 2, 5), places_b=ZEROS, weights_b=D(3, 2, 0))}, "of both sides, or of none",
    ),
    "another θ": ({"a": UNILORA, "b": replace(UNILORA, theta=D(3))}, "one unilora_theta_d for all modules"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit(case: str) -> None:
    deltas, said = REFUSED[case]
    with pytest.raises(LoratoolsError, match=said):
        written(**deltas)
