"""Writing peft's other methods: the config's common fields, what is carried, what is whole, and what no method can say."""

from __future__ import annotations

import json

import pytest

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import Unsettled
from loratools.errors import LoratoolsError, NotExpressible
from loratools.formats import encode
from loratools.formats.peft import decode
from loratools.formats.peft_method_encode import row_for
from tests.formats.matrix import Draw, bounded, glora, loha, lokr, low, near_one

X, Y = "model.x.weight", "model.y.weight"


def adapter(**more: Delta) -> Adapter:
    return Adapter({X: loha(Draw(), "linear"), **{f"model.{name.replace('__', '.')}": delta for name, delta in more.items()}})


def test_which_row_writes_it() -> None:
    rows = [row_for(Adapter({X: make(Draw(), "linear")})) for make in (loha, lokr, bounded)]
    assert [row and row.peft_type for row in rows] == ["LOHA", "LOKR", "OFT"]
    for other in (low(Draw(), "linear"), glora(Draw(), "linear")):
        assert row_for(Adapter({X: other})) is None
    assert row_for(Adapter({X: loha(Draw(), "linear"), Y: low(Draw(), "linear")})) is None


def test_the_config_has_what_peft_needs_and_no_more() -> None:
    made = encode(adapter(), "peft")
    assert made.config == {
        "alpha": 3, "alpha_pattern": {}, "base_model_name_or_path": None, "inference_mode": True, "init_weights": True,
        "peft_type": "LOHA", "peft_version": "0.21.2", "r": 2, "rank_pattern": {}, "revision": None,
        "target_modules": ["model.x"], "task_type": None, "use_effective_conv2d": False,
    }  # fmt: skip
    assert set(made.tensors) == {f"base_model.model.model.x.hada_w{one}_{side}" for one in "12" for side in "ab"}


def test_what_mattered_in_training_is_carried_where_it_was_of_this_method() -> None:
    stated = {"rank_dropout": 0.5, "task_type": "CAUSAL_LM", "exclude_modules": ["head"], "target_modules": ["x"]}
    for kind, carried in (("LOHA", True), ("LORA", False)):
        source = Adapter(adapter().deltas, {"peft": stated | {"peft_type": kind}})
        config = encode(source, "peft").config or {}
        assert config["task_type"] == "CAUSAL_LM" and config["target_modules"] == ["model.x"]
        assert ("rank_dropout" in config, "exclude_modules" in config) == (carried, carried)


def test_modules_saved_whole_come_along() -> None:
    value = Replacement(value=Draw(5)(6, 4))
    made = encode(adapter(norm__weight=Replacement(value=Draw()(6)), x__weight=Chain(first=value, then=loha(Draw(), "linear"))), "peft")
    assert (made.config or {})["modules_to_save"] == ["model.norm"]
    assert {"base_model.model.model.norm.weight", "base_model.model.model.x.base_layer.weight"} < set(made.tensors)
    assert json.loads(made.metadata["loratools.saved"]) == ["model.norm.weight", "model.x.weight"]
    assert {name: delta.kind for name, delta in decode(made).items()} == {"model.norm.weight": "replacement", X: "chain"}


REFUSED: dict[str, tuple[Adapter, str]] = {
    "another kind": (adapter(y__weight=glora(Draw(), "linear")), r"model\.y\.weight: peft's LOHA cannot say a GLoRA delta; convert it"),
    "two methods": (adapter(y__weight=lokr(Draw(), "linear")), r"model\.y\.weight: peft's LOHA cannot say a LoKr delta"),
    "a bias": (adapter(x__bias=Full(diff=Draw()(6))), r"model\.x\.bias: peft's LOHA cannot say a whole-tensor delta"),
    "a bias saved": (adapter(x__bias=Replacement(value=Draw()(6))), r"model\.x\.bias: peft's LOHA saves no biases; --format loratools"),
    "a passenger": (Adapter(adapter().deltas, passengers={"emb": Draw()(2)}), r"emb: peft has no place for it"),
    "stored transposed": (
        adapter(x__weight=Unsettled(delta=loha(Draw(), "linear"), transposed=True)), "puts LOHA on no weight that is stored transposed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_method_cannot_say(case: str) -> None:
    source, said = REFUSED[case]
    with pytest.raises((NotExpressible, LoratoolsError), match=said):
        encode(source, "peft")


def test_of_whole_tensors_alone_peft_is_told_to_target_nothing() -> None:
    config = encode(Adapter({"norm.weight": Replacement(value=near_one(Draw(), 4))}), "peft").config
    assert config is not None and config["target_modules"] == "dummy-target-modules" and config["modules_to_save"] == ["norm"]
