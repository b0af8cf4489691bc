"""AdaLoRA, C3A, MiSS, DeLoRA and GraLoRA written from deltas alone: the least that says them, and what one config cannot say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loratools.adapter import Adapter
from loratools.deltas.adalora import AdaLoRA
from loratools.deltas.base import Delta
from loratools.deltas.bat import Bat
from loratools.deltas.c3a import C3A
from loratools.deltas.delora import DeLoRA
from loratools.deltas.gralora import GraLoRA
from loratools.deltas.miss import MiSS
from loratools.errors import LoratoolsError
from loratools.formats import encode
from loratools.formats.peft import decode
from tests.formats.matrix import Draw, check_same

D = Draw()
ADALORA = AdaLoRA(A=D(2, 4), B=D(6, 2), E=D(2, 1), alpha=3.0, first=3)
GRALORA = GraLoRA(A=D(2, 2, 4), B=D(2, 4, 3), alpha=3.0)
DELORA = DeLoRA(A=D(2, 4), B=D(6, 2), strength=D(1), w_norm=D(4))


def config_of(stated: dict[str, Any] | None = None, **deltas: Delta) -> dict[str, Any]:
    """The config of what is written, which reads as the same again."""
    adapter = Adapter({name.replace("__", "."): delta for name, delta in deltas.items()}, {"peft": stated or {}})
    made = encode(adapter, "peft")
    check_same(adapter, decode(made))
    return dict(made.config or {})


def test_masks_say_how_many_ranks_are_left() -> None:
    config = config_of(a__weight=ADALORA, b__weight=replace(ADALORA, A=D(3, 4), B=D(6, 3), E=D(3, 1)))
    assert config["rank_pattern"] == {"a.lora_E": [True, True, False]} and config["init_r"] == 3 and config["total_step"] == 1
    told = {"peft_type": "ADALORA", "rank_pattern": {"a.lora_E": [False, True, True], "b.lora_E": [True] * 2}, "total_step": 9}
    config = config_of(told, a__weight=ADALORA)
    assert config["rank_pattern"] == {"a.lora_E": [False, True, True]} and config["total_step"] == 9


def test_blocks_of_several_sizes() -> None:
    """A pattern of C3A's fits what stands behind a dot, or is the whole of a name without one."""
    sizes = {"q": 2, "a__q": 4, "b__a__q": 2, "a__v": 4, "b__v": 4, "c__v": 4, "xa__q": 8}
    deltas = {f"{path}__weight": C3A(kernel=D(2, 1, size)) for path, size in sizes.items()}
    config = config_of(**deltas)
    assert config["block_size"] == 4 and list(config["block_size_pattern"])[-1] == "q"


def test_the_three_variants_of_miss() -> None:
    assert config_of(a__weight=MiSS(block=D(3, 6)))["init_weights"] is True
    assert config_of({"peft_type": "MISS", "init_weights": False}, a__weight=MiSS(block=D(3, 6)))["init_weights"] is False
    mini = config_of(a__weight=MiSS(block=D(3, 2), mini=True))
    assert (mini["init_weights"], mini["r"], mini["mini_r"]) == ("mini", 3, 2)
    bat = config_of(a__weight=Bat(M=D(3, 2, 2)))
    assert (bat["init_weights"], bat["r"]) == ("bat", 2)


def test_ranks_by_patterns_and_a_hybrid() -> None:
    config = config_of(a__weight=DELORA, b__weight=DELORA, c__weight=DeLoRA(A=D(1, 4), B=D(6, 1), strength=D(1), w_norm=D(4)))
    assert config["r"] == 2 and config["rank_pattern"] == {r"^c": 1}
    config = config_of(a__weight=replace(GRALORA, down=D(1, 4), up=D(6, 1)))
    assert (config["r"], config["hybrid_r"], config["gralora_k"], config["alpha"]) == (4, 1, 2, 3)


REFUSED: dict[str, tuple[dict[str, Delta], str]] = {
    "more ranks than at first": ({"a__weight": replace(ADALORA, first=1)}, r"a\.weight: more ranks than AdaLoRA began with: found 2"),
    "two first ranks": ({"a__weight": ADALORA, "b__weight": replace(ADALORA, first=4)}, r"b\.weight: peft has one init_r for all modules"),
    "two variants": ({"a__weight": MiSS(block=D(2, 6)), "b__weight": Bat(M=D(3, 2, 2))}, "one init_weights for all modules: found bat"),
    "two ranks of MiSS": ({"a__weight": MiSS(block=D(2, 6)), "b__weight": MiSS(block=D(3, 6))}, "one r for all modules: found 3"),
    "two alphas": ({"a__weight": GRALORA, "b__weight": replace(GRALORA, alpha=4.0)}, "one alpha for all modules: found 4.0, expected 3.0"),
    "another kind beside": ({"a__weight": GRALORA, "b__weight": ADALORA}, r"b\.weight: peft's GRALORA cannot say an AdaLoRA delta"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_config_cannot_say(case: str) -> None:
    deltas, said = REFUSED[case]
    with pytest.raises(LoratoolsError, match=said) as caught:
        config_of(**deltas)
    assert "convert it first: --kind lora, or --format loratools keeps it" in str(caught.value)
