"""What holds for a whole adapter of peft's LoRA, and not for some of its modules: KaSA, initialisations, DoRA."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.kasa import KaSA
from loratools.deltas.lowrank import LowRank
from loratools.deltas.residual import Residual
from loratools.errors import LoratoolsError, NotExpressible
from loratools.formats import encode
from loratools.formats.peft import decode
from tests.formats.matrix import Draw, check_same

D = Draw()
LOW = LowRank(A=D(2, 4), B=D(6, 2), alpha=4.0, layer="linear")
KASA = KaSA(A=D(2, 4), B=D(6, 2), d=D(2), alpha=4.0)
PISSA = Residual(init="pissa", then=LOW)


def test_kasa_with_its_diagonals() -> None:
    adapter = Adapter({"a.weight": KASA, "b.weight": replace(KASA, alpha=3.0)})
    made = encode(adapter, "peft")
    check_same(adapter, decode(made))
    config = dict(made.config or {})
    assert config["kasa_config"] == {"beta": 0.0001, "gamma": 0.001} and config["alpha_pattern"] == {"^a": 4}
    told = Adapter(adapter.deltas, {"peft": {"kasa_config": {"beta": 1.0, "gamma": 2.0}}})
    assert (encode(told, "peft").config or {})["kasa_config"] == {"beta": 1.0, "gamma": 2.0}


@pytest.mark.parametrize("then", [LOW, replace(LOW, rslora=True), DoRA(direction=LOW, magnitude=D(6, 1))])
def test_what_an_initialisation_moved(then: LowRank | DoRA) -> None:
    adapter = Adapter({"a.weight": Residual(init="olora", then=then)})
    made = encode(adapter, "peft")
    assert (made.config or {})["init_lora_weights"] == "olora"
    check_same(adapter, decode(made))


KEEPS = "--format loratools keeps it"
REFUSED: dict[str, tuple[dict[str, Delta], str]] = {
    "KaSA on some": ({"a.weight": KASA, "b.weight": LOW}, rf"b\.weight: peft has KaSA on all modules .*plain LoRA; {KEEPS}"),
    "PiSSA on some": ({"a.weight": PISSA, "b.weight": LOW}, rf"b\.weight: peft has pissa on all modules .*plain LoRA; {KEEPS}"),
    "two beginnings": (
        {"a.weight": PISSA, "b.weight": replace(PISSA, init="olora")}, rf"b\.weight: peft initialises all .* alike: found olora; {KEEPS}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_holds_for_all_modules(case: str) -> None:
    deltas, said = REFUSED[case]
    with pytest.raises(NotExpressible, match=said):
        encode(Adapter(deltas), "peft")


def test_all_faults_come_together() -> None:
    dora = DoRA(direction=LOW, magnitude=D(1, 4))
    with pytest.raises(LoratoolsError) as caught:
        encode(Adapter({"a.weight": dora, "b.weight": LOW, "c.kernel": replace(LOW, layer="embedding")}), "peft")
    said = str(caught.value)
    assert all(text in said for text in ("has no DoRA along this axis", "use_dora holds for the whole adapter", "no embedding ones"))
