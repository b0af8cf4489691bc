"""Where names meet: alignment of a prefix, strays, gaps and renames."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, LoratoolsError, MatchError
from loratools.refs import Spec
from loratools.resolution import rename
from loratools.tensors import to_ref
from tests.strategies import randn


def low(out: int = 4, inner: int = 6, layer: str = "unknown") -> LowRank:
    return LowRank(A=to_ref(randn(2, inner, seed=0)), B=to_ref(randn(out, 2, seed=1)), alpha=4.0, layer=layer)


def adapter(*names: str, delta: Delta | None = None) -> Adapter:
    return Adapter({name: delta or low() for name in names})


def base(*names: str, shape: tuple[int, ...] = (4, 6)) -> dict[str, Spec]:
    return dict.fromkeys(names, Spec("F32", shape))


# -- prefixes


def test_names_that_fit_are_left_alone() -> None:
    found = adapter("a.q.weight").resolve(base("a.q.weight", "model.a.q.weight"))
    assert list(found) == ["a.q.weight"] and found.notes == ()


@given(
    st.lists(st.sampled_from(["h.0.q", "h.1.q", "h.1.k", "mlp.up"]), unique=True, min_size=1),
    st.sampled_from(["model", "a.b", "transformer"]),
)
def test_one_prefix_added_or_removed_for_all(modules: list[str], prefix: str) -> None:
    short, long = [f"{module}.weight" for module in modules], [f"{prefix}.{module}.weight" for module in modules]
    for mine, theirs, word in ((short, long, "added"), (long, short, "removed")):
        found = adapter(*mine).resolve(base(*theirs, "other.weight"))
        assert list(found) == theirs
        assert found.notes == (f"names aligned for the whole adapter: prefix '{prefix}.' {word}",)


def test_a_new_head_takes_part_in_the_alignment() -> None:
    """gpt2's base has no `transformer.`; the head beside it belongs to no prefix."""
    deltas = {"transformer.h.0.q.weight": low(), "score.weight": Replacement(value=to_ref(torch.ones(2, 6)))}
    found = Adapter(deltas).resolve(base("h.0.q.weight"))
    assert list(found) == ["h.0.q.weight", "score.weight"]


@pytest.mark.parametrize(
    "there",
    [
        ["encoder.a.q.weight", "decoder.a.q.weight"],
        ["x.model.a.q.weight", "model.x.a.q.weight"],
    ],
)
def test_an_alignment_that_could_be_another_is_refused(there: list[str]) -> None:
    with pytest.raises(AmbiguousError, match=r"under several prefixes.*--rename"):
        adapter("a.q.weight").resolve(base(*there))
    chosen = there[0].removesuffix("a.q.weight").rstrip(".")
    assert list(adapter("a.q.weight").resolve(base(*there), renames=[("a", f"{chosen}.a")])) == [there[0]]


def test_the_prefix_that_fits_all_wins_over_one_that_fits_some() -> None:
    found = adapter("a.q.weight", "b.q.weight").resolve(base("x.a.q.weight", "y.a.q.weight", "y.b.q.weight"))
    assert list(found) == ["y.a.q.weight", "y.b.q.weight"]


def test_two_prefixes_that_fit_as_many_but_not_all_are_refused() -> None:
    for allowed in (False, True):
        with pytest.raises(AmbiguousError, match=r"'x\.' or 'y\.'"):
            adapter("a.q.weight", "c.q.weight").resolve(base("x.a.q.weight", "y.a.q.weight"), allow_unmatched=allowed)


def test_alignment_does_not_hide_a_stray() -> None:
    with pytest.raises(MatchError, match=r"model\.b\.q\.weight: the base has no such weight"):
        adapter("a.q.weight", "b.q.weight").resolve(base("model.a.q.weight"))


# -- strays, gaps, renames


def test_nothing_matched_says_what_the_base_has() -> None:
    with pytest.raises(MatchError, match=r"none of the adapter's 2 weights is in the base.*y\.k\.weight"):
        adapter("a.q.weight", "b.q.weight").resolve(base("y.k.weight"))
    with pytest.raises(MatchError, match="none of the adapter's"):
        adapter("a.q.weight").resolve(base("y.k.weight"), allow_unmatched=True)


def test_a_stray_is_named_with_its_nearest_and_can_be_left_out() -> None:
    with pytest.raises(MatchError, match=r"a\.qq\.weight: the base has no such weight: found nearest a\.q\.weight"):
        adapter("a.q.weight", "a.qq.weight").resolve(base("a.q.weight"))
    found = adapter("a.q.weight", "a.qq.weight").resolve(base("a.q.weight"), allow_unmatched=True)
    assert list(found) == ["a.q.weight"] and found.notes == ("not applied, the base has no a.qq.weight",)


def test_every_fault_is_shown() -> None:
    deltas = {"a.weight": low(), "b.weight": low(), "c.weight": low(), "d.weight": low()}
    with pytest.raises(LoratoolsError) as caught:
        Adapter(deltas).resolve(base("a.weight") | base("b.weight", shape=(5, 5)))
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == ["c.weight", "d.weight", "b.weight"]


def test_what_the_file_promises_must_be_there() -> None:
    promising = dataclasses.replace(adapter("a.weight"), expects=lambda specs: [name for name in specs if name != "n.weight"])
    assert list(promising.resolve(base("a.weight", "n.weight"))) == ["a.weight"]
    with pytest.raises(MatchError, match=r"b\.weight: the adapter's config covers this weight"):
        promising.resolve(base("a.weight", "b.weight"))
    assert list(promising.resolve(base("a.weight", "b.weight"), allow_unmatched=True)) == ["a.weight"]


@pytest.mark.parametrize(
    ("renames", "expected"),
    [
        ([("model", "language_model.model")], "language_model.model.layers.0.q.weight"),
        ([("layers.0", "layers.1")], "model.layers.1.q.weight"),
        ([("model", "")], "layers.0.q.weight"),
        ([("layers", "blocks"), ("blocks", "h")], "model.h.0.q.weight"),
        ([("layer", "x"), ("mode", "y"), ("0.q.weigh", "z")], "model.layers.0.q.weight"),
    ],
)
def test_renames_are_of_whole_components(renames: list[tuple[str, str]], expected: str) -> None:
    assert rename("model.layers.0.q.weight", renames) == expected


def test_a_rename_that_does_nothing_or_collides() -> None:
    with pytest.raises(MatchError, match="changed no name"):
        adapter("a.weight").resolve(base("a.weight"), renames=[("x", "y")])
    with pytest.raises(MatchError, match="two tensors meet"):
        adapter("a.weight", "b.weight").resolve(base("a.weight"), renames=[("b", "a")])


