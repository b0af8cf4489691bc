"""alignment: one prefix for the whole adapter where it makes names meet the base, heads beside it, old spellings; else nothing."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from loratools.alignment import align, respelt
from loratools.errors import AmbiguousError, MatchError


def aligned(needing: Collection[str], base: Collection[str], new: Collection[str] = ()) -> dict[str, str]:
    """Where each name goes; `new` ones need not be in the base."""
    found, _ = align({name: name for name in (*needing, *new)}, needing, base)
    return {name: place for place, name in found.items()}


BERT = ("bert.encoder.layer.0.attention.self.query.weight", "bert.embeddings.word_embeddings.weight")
GPT2 = ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight")
LLAMA = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("prefix", "long", "heads"),
    [
        ("bert.", BERT, ["cls.predictions.decoder.weight"]),
        ("bert.", BERT, ["classifier.weight"]),
        ("transformer.", GPT2, ["lm_head.weight"]),
        ("transformer.", GPT2[:1], ["lm_head.weight"]),
        ("transformer.", GPT2, ["score.weight", "score.bias"]),
        ("model.", LLAMA, ["lm_head.weight"]),
        ("model.", LLAMA[:1], ["score.weight"]),
        ("model.language_model.", ["model.language_model.layers.0.mlp.up_proj.weight"], ["lm_head.weight"]),
        ("unet.", ["unet.down_blocks.0.attentions.0.to_q.weight"], []),
    ],
)
@pytest.mark.parametrize("where", ["in the base", "new", "absent"])
def test_heads_do_not_carry_the_prefix(prefix: str, long: list[str], heads: list[str], where: str) -> None:
    if where == "absent":
        heads = []
    short, here = [name.removeprefix(prefix) for name in long], heads if where == "in the base" else []
    for mine, theirs, word in ((long, short, "removed"), (short, long, "added")):
        named = dict.fromkeys([*mine, *heads])
        found, notes = align(named, [*mine, *here], [*theirs, *here, "other.weight"])
        assert list(found) == [*theirs, *heads]
        kept = f"; as they are: {', '.join(heads)}" if heads else ""
        assert notes == [f"names aligned for the whole adapter: prefix '{prefix}' {word}{kept}"]


def test_what_fits_is_left_alone() -> None:
    assert aligned(LLAMA, [*LLAMA, *(f"x.{name}" for name in LLAMA)], ["score.weight"]) == {name: name for name in (*LLAMA, "score.weight")}
    assert align(dict.fromkeys(LLAMA), LLAMA, LLAMA) == (dict.fromkeys(LLAMA), [])


def test_a_new_tensor_goes_where_its_parent_is() -> None:
    """A bias that the base lacks stands beside its weight; a head stands by itself."""
    short = ["layers.0.self_attn.q_proj.weight"]
    found = aligned(short, LLAMA, ["layers.0.self_attn.q_proj.bias", "score.weight"])
    assert found["layers.0.self_attn.q_proj.bias"] == "model.layers.0.self_attn.q_proj.bias" and found["score.weight"] == "score.weight"
    found = aligned(LLAMA[:1], short, ["model.layers.0.self_attn.q_proj.bias", "model.new.weight", "score.weight"])
    assert found["model.layers.0.self_attn.q_proj.bias"] == "layers.0.self_attn.q_proj.bias"
    assert (found["model.new.weight"], found["score.weight"]) == ("new.weight", "score.weight")


def test_a_stray_beside_names_that_fit_is_not_moved() -> None:
    """One name of the adapter cannot have another prefix than the others."""
    strays = {"mlp.up_proj.weight": "mlp.up_proj.weight"}
    assert aligned([*LLAMA, *strays], LLAMA) == {name: name for name in LLAMA} | strays
    many = ["a.weight", "b.weight", "c.weight"]
    assert aligned([*many, "q.weight", "r.weight"], [*many, "x.q.weight", "y.r.weight"]) == {
        name: name for name in (*many, "q.weight", "r.weight")
    }


def test_a_stray_of_an_adapter_that_is_aligned_keeps_its_place() -> None:
    found = aligned([*GPT2, "transformer.h.9.attn.c_attn.weight"], [name.removeprefix("transformer.") for name in GPT2])
    assert found["transformer.h.9.attn.c_attn.weight"] == "h.9.attn.c_attn.weight"


def test_what_could_be_several_is_refused() -> None:
    names = ["layers.0.q.weight", "layers.1.q.weight"]
    with pytest.raises(AmbiguousError, match=r"under several prefixes: found 'text_encoder\.' or 'text_encoder_2\.'; give --rename"):
        aligned(names, [f"{prefix}.{name}" for prefix in ("text_encoder", "text_encoder_2") for name in names])
    with pytest.raises(AmbiguousError, match=r"'without a\.' or 'x\.'"):
        aligned(["a.q.weight"], ["q.weight", "x.a.q.weight"])


def test_two_names_of_one_tensor_are_refused() -> None:
    with pytest.raises(MatchError, match=r"h\.0\.q\.weight: two tensors of the adapter meet under this name"):
        aligned(["transformer.h.0.q.weight", "transformer.h.1.q.weight"], ["h.0.q.weight", "h.1.q.weight"], ["h.0.q.weight"])
    with pytest.raises(MatchError, match=r"x\.LayerNorm\.gamma: two tensors"):
        aligned(["x.LayerNorm.gamma", "x.LayerNorm.weight"], ["x.LayerNorm.gamma"])


SPELLINGS = [
    ("encoder.LayerNorm.weight", "encoder.LayerNorm.gamma"),
    ("encoder.LayerNorm.bias", "encoder.LayerNorm.beta"),
    ("conv.parametrizations.weight.original0", "conv.weight_g"),
    ("conv.parametrizations.weight.original1", "conv.weight_v"),
    ("LayerNorm.weight", "LayerNorm.gamma"),
]


@pytest.mark.parametrize(("new", "old"), SPELLINGS)
@pytest.mark.parametrize("needing", [True, False])
def test_old_spellings_meet_new_ones_both_ways(new: str, old: str, needing: bool) -> None:
    for mine, theirs in ((new, old), (old, new)):
        names = [mine] if needing else []
        found, notes = align({mine: 1, "a.weight": 2}, [*names, "a.weight"], [theirs, "a.weight"])
        assert found == {theirs: 1, "a.weight": 2} and notes == [f"names as the base spells them: {mine} is {theirs}"]
        assert align({mine: 1}, names, [mine, theirs]) == ({mine: 1}, [])


def test_a_spelling_and_a_prefix_at_once() -> None:
    """An old BERT on the Hub: `LayerNorm.gamma`, and the base class's prefix in the file."""
    mine = ["encoder.layer.0.output.LayerNorm.weight", "encoder.layer.0.output.LayerNorm.bias", "encoder.layer.0.output.dense.weight"]
    base = [
        "bert.encoder.layer.0.output.LayerNorm.gamma", "bert.encoder.layer.0.output.LayerNorm.beta",
        "bert.encoder.layer.0.output.dense.weight",
    ]  # fmt: skip
    for needing in (mine, mine[2:], mine[:1]):
        found, notes = align(dict.fromkeys(mine), needing, base)
        assert list(found) == base
        assert notes == [
            "names aligned for the whole adapter: prefix 'bert.' added",
            f"names as the base spells them: {mine[0]} is {base[0]}, and 1 more alike",
        ]
        back, _ = align(dict.fromkeys(base), base, mine)
        assert list(back) == mine


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("block.gamma", ["block.weight"]),  # a layer scale
        ("norm.weight", ["norm.gamma"]),
        ("my_LayerNorm.weight", ["my_LayerNorm.gamma"]),
        ("a.weight_g", ["a.weight"]),
        ("x.original0", ["x.weight_g"]),
    ],
)
def test_names_that_only_look_alike_are_others(name: str, base: list[str]) -> None:
    assert respelt(name, base) is None
