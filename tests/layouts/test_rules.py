"""Rules one by one: what a name becomes, where a rule holds, and what is refused."""

from __future__ import annotations

import pytest

from loratools.layouts.rules import Fusion, Group, Layout, Layouts, Other, Place, Refused, Rename, Rule

FUSED = Fusion((r".experts.(\d+).w1.weight(?!\w)", r".experts.(\d+).w3.weight(?!\w)"), ".experts.gate_up_proj")


def place(name: str, *rules: Rule, within: str = "") -> Place | Refused:
    return Layout("x", rules, within).places([name])[name]


@pytest.mark.parametrize(
    ("rule", "name", "expected"),
    [
        (Rename(r"^visual", "model.visual"), "visual.blocks.0.weight", "model.visual.blocks.0.weight"),
        (Rename(r"^visual", "model.visual"), "model.visual.blocks.0.weight", "model.visual.blocks.0.weight"),
        (Rename(r"^vision_model\.(.+)", r"\1"), "vision_model.a.weight", "a.weight"),
        (Rename(r"^model(?!\.visual)", "model.language_model"), "model.layers.0.weight", "model.language_model.layers.0.weight"),
        (Rename(r"layers.(\d+).fc1(?!\w)", r"layers.\1.mlp.fc1"), "layers.12.fc1.weight", "layers.12.mlp.fc1.weight"),
        (Rename(r"layers.(\d+).fc1(?!\w)", r"layers.\1.mlp.fc1"), "layers.12.fc12.weight", "layers.12.fc12.weight"),
        (Rename("^", "model."), "layers.0.weight", "model.layers.0.weight"),
        (Rename("norm", "n"), "norm.norm.weight", "n.norm.weight"),
        (Rename(r"queries\.(\d+)", r"layers.\1.query", offset=1), "queries.9", "layers.10.query"),
        (Rename(r"^a", "b", ("model.vision.", "vision.")), "model.vision.a.weight", "model.vision.b.weight"),
        (Rename(r"^a", "b", ("model.vision.", "vision.")), "vision.a.weight", "vision.b.weight"),
        (Rename(r"^a", "b", ("model.vision.", "vision.")), "text.a.weight", "text.a.weight"),
        (Rename(r"^a", "b", ("model.", "")), "a.weight", "b.weight"),
    ],
)
def test_a_name_in_memory(rule: Rename, name: str, expected: str) -> None:
    assert place(name, rule) == Place(expected)


def test_renamings_follow_each_other() -> None:
    rules = Rename(r"^language_model.model", "language_model"), Rename("^language_model", "model.language_model")
    assert place("language_model.model.layers.0.weight", *rules) == Place("model.language_model.layers.0.weight")
    assert place("language_model.model.layers.0.weight", *rules[::-1]) == Place("model.language_model.model.layers.0.weight")


def test_a_group_holds_where_its_first_name_is_there() -> None:
    group = Group((Rename(r"\.norm0(?!\w)", ".norm1"), Rename(r"\.norm1(?!\w)", ".norm2")))
    old, new = ["b.0.norm0.weight", "b.0.norm1.weight"], ["b.0.norm1.weight", "b.0.norm2.weight"]
    for names in (old, old[::-1], new):
        assert {place.name for place in Layout("x", (group,)).places(names).values() if isinstance(place, Place)} == set(new)


def test_matrices_of_a_stack() -> None:
    assert place("l.0.experts.12.w1.weight", FUSED) == Place("l.0.experts.gate_up_proj", 12, 0, 2)
    assert place("l.0.experts.12.w3.weight", FUSED) == Place("l.0.experts.gate_up_proj", 12, 1, 2)
    for other in ("l.0.experts.12.w2.weight", "l.0.experts.x.w1.weight", "l.0.experts.1.w1.weight_scale_inv", "l.0.experts.1.w1.bias"):
        assert place(other, FUSED) == Place(other)
    assert place("l.0.moe.experts.1.w1.weight", Rename(".moe.", ".mlp."), FUSED) == Place("l.0.mlp.experts.gate_up_proj", 1, 0, 2)


def test_what_is_converted_is_refused_by_name() -> None:
    rule = Other((r"attn\.qkv(?!\w)",), ("attn.q", "attn.k"), "Chunk")
    assert place("l.0.attn.qkv.weight", rule) == Refused(("l.0.attn.q.weight", "l.0.attn.k.weight"), "Chunk")
    assert place("l.0.attn.o.weight", rule) == Place("l.0.attn.o.weight")


def test_what_is_only_turned_keeps_its_name() -> None:
    rule = Other((r"mlp.experts.down_proj(?!\w)",), ("mlp.experts.down_proj",), "Transpose")
    layouts = Layouts((Layout("x", (rule,), "m."),), "t")
    name = "m.l.0.mlp.experts.down_proj"
    assert layouts.places([name]) == {name: Place(name)}
    assert layouts.turns(name) and not layouts.turns("m.l.0.mlp.experts.gate_up_proj") and layouts.size == 1
    assert not Layout("x", (Other(("a(?!\\w)",), ("b",), "Transpose"),)).turns("l.a")


def test_each_model_of_a_pipeline_has_its_own_rules() -> None:
    one = Layout("one", (Rename("^a", "b"),), "text.")
    other = Layout("other", (FUSED, Other(("^q",), ("k",), "Chunk")), "unet.")
    found = Layouts((one, other), "t").places(["text.a.weight", "unet.a.weight", "unet.x.experts.1.w1.weight", "unet.q", "vae.a"])
    assert found == {
        "text.a.weight": Place("text.b.weight"),
        "unet.a.weight": Place("unet.a.weight"),
        "unet.x.experts.1.w1.weight": Place("unet.x.experts.gate_up_proj", 1, 0, 2),
        "unet.q": Refused(("unet.k",), "Chunk"),
        "vae.a": Place("vae.a"),
    }
