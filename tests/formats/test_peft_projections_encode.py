"""DEFT, PEANUT, OSF and HRA written from deltas alone, and what one config cannot say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.networked import Networked
from loratools.deltas.projected import Projected
from loratools.deltas.reflected import Reflected
from loratools.deltas.subspace import Subspace
from loratools.errors import LoratoolsError
from loratools.formats import encode
from loratools.formats.peft import decode
from tests.formats.matrix import Draw, check_same

D = Draw()
DEFT = Projected(P=D(6, 2), R=D(2, 4), method="qr")
PEANUT = Networked(A=D(2, 6), B=D(6, 2), encoders=(D(2, 2),), decoders=(D(2, 2),), activation="tanh", scale=1.5)
OSF = Subspace(U=D(6, 3), S=D(3), V=D(3, 4))
HRA = Reflected(U=D(4, 2), orthogonal=True)


def config_of(stated: dict[str, Any] | None = None, **deltas: Delta) -> dict[str, Any]:
    adapter = Adapter({f"{path.replace('__', '.')}.weight": delta for path, delta in deltas.items()}, {"peft": stated or {}})
    made = encode(adapter, "peft")
    check_same(adapter, decode(made))
    return dict(made.config or {})


def test_ranks_as_far_as_the_outputs_go_and_scales_of_one_alpha() -> None:
    config = config_of(a=DEFT, b=Projected(P=D(1, 1), R=D(1, 4), method="qr"))
    assert (config["r"], config["alpha"], config["para"], config["decomposition_method"]) == (2, None, False, "qr")
    assert config_of(a=replace(DEFT, scale=1.5))["alpha"] == 3
    assert config_of({"peft_type": "DEFT", "alpha": 3.0}, a=replace(DEFT, scale=1.5))["alpha"] == 3
    config = config_of(a=replace(DEFT, R=None))
    assert config["para"] is True


def test_networks_and_reflections() -> None:
    config = config_of(a=PEANUT)
    assert (config["r"], config["depth"], config["act_fn"], config["scaling"]) == (2, 1, "tanh", 1.5)
    config = config_of(a=HRA)
    assert (config["r"], config["apply_GS"]) == (2, True)


def test_kept_values_by_exact_patterns() -> None:
    """peft looks for OSF's patterns anywhere in a path."""
    config = config_of(a=OSF, xa=OSF, a__b=replace(OSF, U=D(6, 2), S=D(2), V=D(2, 4)))
    assert config["effective_rank"] == 1 and config["rank_pattern"] == {r"^a\.b$": 2}


REFUSED: dict[str, tuple[dict[str, Delta], str]] = {
    "two ranks": ({"a": DEFT, "b": Projected(P=D(6, 1), R=D(1, 4), method="qr")}, r"b\.weight: peft has one r for all modules: found 1"),
    "scales of no one alpha": (
        {"a": replace(DEFT, scale=1.5), "b": replace(DEFT, scale=2.5)}, r"a\.weight: peft makes the scales of all modules of one alpha"
    ),
    "two depths": ({"a": PEANUT, "b": replace(PEANUT, encoders=(), decoders=())}, "one depth for all modules"),
    "some orthogonal": ({"a": HRA, "b": replace(HRA, orthogonal=False)}, "one apply_GS for all modules"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_config_cannot_say(case: str) -> None:
    deltas, said = REFUSED[case]
    with pytest.raises(LoratoolsError, match=said):
        config_of(**deltas)
