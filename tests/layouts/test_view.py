"""A base as an adapter names it: which view is chosen, when it is an error, and what is said. Layouts here are made up."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parameters import Choice, OnParameter
from loratools.errors import AmbiguousError, LoratoolsError, MatchError, UnsupportedError
from loratools.layouts.places import Fused, Same, Within
from loratools.layouts.rules import Fusion, Group, Layout, Layouts, Other, Rename, Rule
from loratools.layouts.view import View, view_of
from loratools.refs import InMemory, Spec

S = Spec("F32", (6, 4))
STACKS = (
    Rename(r"\.moe\.", ".mlp."),
    Fusion((r"\.experts\.(\d+)\.w1\.weight(?!\w)", r"\.experts\.(\d+)\.w3\.weight(?!\w)"), ".experts.gate_up"),
    Fusion((r"\.experts\.(\d+)\.w2\.weight(?!\w)",), ".experts.down"),
)
SINGLE = [f"model.layers.{layer}.moe.experts.{expert}.w{part}.weight" for layer in range(2) for expert in range(3) for part in (1, 2, 3)]
HEIGHTS = {"gate_up": 12, "down": 6}
STACKED = {f"model.layers.{layer}.mlp.experts.{name}": Spec("F32", (3, HEIGHTS[name], 4)) for layer in range(2) for name in HEIGHTS}
Q = "model.layers.0.q.weight"


def low() -> LowRank:
    return LowRank(A=InMemory(Spec("F32", (2, 4)), b""), B=InMemory(Spec("F32", (6, 2)), b""), alpha=1.0)


def layouts(*rules: Rule, title: str = "t") -> Layouts:
    return Layouts((Layout("x", rules),), title)


def seen(
    names: Iterable[str], base: Iterable[str] | dict[str, Spec], known: Layouts | None = None, *others: Layouts, fixed: Iterable[str] = (),
    **more: Delta,
) -> tuple[View, dict[str, str], list[str]]:  # fmt: skip
    """The view, each name there, and the notes."""
    specs = base if isinstance(base, dict) else dict.fromkeys(base, S)
    deltas: dict[str, Delta] = {name: low() for name in names} | {name.replace("__", "."): delta for name, delta in more.items()}
    view, (aligned, notes) = view_of(deltas, specs, known, lambda: others, set(fixed))
    return view, aligned, notes + view.said(aligned.values())


def where(found: tuple[View, dict[str, str], list[str]]) -> dict[str, object]:
    view, names, _ = found
    return {name: view.where.get(place, Same(place)) for name, place in names.items()}


# -- what is chosen


def test_names_that_meet_are_left_alone() -> None:
    view, names, notes = seen([Q], [Q, "x.weight"], layouts(Rename("^x", "y")))
    assert view.where == {} and names == {Q: Q} and notes == []


def test_names_in_memory() -> None:
    found = seen(["c.weight", "b.weight"], ["a.weight", "b.weight"], layouts(Rename("^a", "c")))
    assert where(found) == {"c.weight": Same("a.weight"), "b.weight": Same("b.weight")}
    assert found[2] == ["names aligned: 1 of 2 are others in the base's file (t)"]


def test_names_of_files() -> None:
    found = seen(["a.weight", "b.weight"], ["model.a.weight", "b.weight"], layouts(Rename("^a", "model.a")))
    assert where(found) == {"a.weight": Same("model.a.weight"), "b.weight": Same("b.weight")}


def test_both_names_of_files_of_different_age() -> None:
    rules = layouts(Rename(r"^old\.", "new."), Rename(r"^older\.", "new."))
    assert where(seen(["old.weight"], ["older.weight"], rules)) == {"old.weight": Same("older.weight")}


def test_stacks_and_their_matrices() -> None:
    found = seen([*STACKED, Q], dict.fromkeys(SINGLE, S) | {Q: S}, layouts(*STACKS))
    places = where(found)
    fused = places["model.layers.1.mlp.experts.gate_up"]
    assert isinstance(fused, Fused) and fused.matrices[3] == ("model.layers.1.moe.experts.1.w3.weight", 1, 6, 12)
    assert found[0].specs["model.layers.0.mlp.experts.down"] == Spec("F32", (3, 6, 4))
    assert found[2] == ["names aligned: 4 of 5 are others in the base's file (t); 4 fused tensors are 18 matrices there"]
    found = seen([*SINGLE, Q], {**STACKED, Q: S}, layouts(*STACKS))
    assert where(found)["model.layers.1.moe.experts.2.w3.weight"] == Within("model.layers.1.mlp.experts.gate_up", 30, 36)
    assert found[0].specs["model.layers.1.moe.experts.2.w3.weight"] == S
    assert found[2] == ["names aligned: 18 of 19 are others in the base's file (t); 18 matrices lie in 4 fused tensors there"]


def test_matrices_under_a_name_between() -> None:
    """`mlp` as in memory, experts one by one as in the file."""
    between = [name.replace(".moe.", ".mlp.") for name in SINGLE]
    assert where(seen(between, SINGLE, layouts(*STACKS)))[between[4]] == Same(SINGLE[4])


def test_a_prefix_may_be_lacking_too() -> None:
    found = seen(["model.a.weight"], ["x.b.weight"], layouts(Rename(r"x\.b", "a")))
    assert where(found) == {"model.a.weight": Same("x.b.weight")}
    assert found[2] == [
        "names aligned for the whole adapter: prefix 'model.' removed", "names aligned: 1 of 1 are others in the base's file (t)",
    ]  # fmt: skip


def test_other_layers_and_experts_are_spelt_as_the_adapter_spells_its_own() -> None:
    """So that a config's promise is held against the base, whatever it stores."""
    for held in (SINGLE[:9], SINGLE[:3]):
        view, _, _ = seen(held, STACKED, layouts(*STACKS))
        assert set(view.specs) == set(SINGLE)
    view, _, _ = seen(["l.1.a.weight"], [f"l.{index}.b.weight" for index in range(3)], layouts(Rename(r"\.a\.", ".b.")))
    assert set(view.specs) == {f"l.{index}.a.weight" for index in range(3)}


def test_a_tensor_that_may_be_new_is_found_rather_than_added() -> None:
    head = Replacement(value=InMemory(S, b""))
    known = layouts(Rename("^embed_out", "lm_head"))
    assert where(seen([Q], [Q, "embed_out.weight"], known, lm_head__weight=head))["lm_head.weight"] == Same("embed_out.weight")
    assert where(seen([Q], [Q, "lm_head.weight"], known, embed_out__weight=head))["embed_out.weight"] == Same("lm_head.weight")
    found = seen([Q], [Q, "embed_out.weight"], known, score__weight=head)
    assert where(found)["score.weight"] == Same("score.weight") and found[2] == []


def test_a_wrapper_meets_where_any_of_its_choices_does() -> None:
    module = "model.layers.0.mlp.experts"
    choices = tuple(Choice(f"{module}.{name}", 1.0, 1) for name in ("weight", "down"))
    A, B = InMemory(Spec("F32", (3, 4)), b""), InMemory(Spec("F32", (6, 3)), b"")
    delta = OnParameter(A=A, B=B, module=module, depth=0, choices=choices)
    view, (names, _) = view_of({f"{module}.weight": delta}, dict.fromkeys(SINGLE, S), layouts(*STACKS), list, set())
    assert view.title == "t" and names == {f"{module}.weight": f"{module}.weight"}


def test_the_users_names_are_the_bases_own() -> None:
    base, known = ["a.weight", "b.weight"], layouts(Rename("^a", "model.a"), Rename("^b", "model.b"))
    found = seen(["model.a.weight", "b.weight"], base, known, fixed=["b.weight"])
    assert where(found) == {"model.a.weight": Same("a.weight"), "b.weight": Same("b.weight")}
    found = seen(["a.weight", "model.b.weight"], base, known, fixed=["a.weight"])
    assert where(found) == {"a.weight": Same("a.weight"), "model.b.weight": Same("b.weight")}


# -- a base that does not say which model it is


def test_without_a_type_only_what_has_all_names_meet() -> None:
    one, other, none = (layouts(Rename("^a", new), title=new) for new in ("c", "d", "e"))
    found = seen(["d.weight", "b.weight"], ["a.weight", "b.weight"], None, one, other, none)
    assert where(found)["d.weight"] == Same("a.weight") and found[0].title == "d"
    found = seen(["d.weight", "x.weight"], ["a.weight", "b.weight"], None, one, other)
    assert found[0].where == {} and found[0].title == ""


def test_several_that_agree_are_as_good_as_one() -> None:
    rules = [layouts(Rename("^a", "net.a"), Rename(f"^{more}", "q"), title=more) for more in ("x", "y")]
    found = seen(["net.a.weight"], ["a.weight"], None, *rules)
    assert where(found) == {"net.a.weight": Same("a.weight")}


def test_several_that_differ_are_refused() -> None:
    rules = layouts(Rename("^a", "net.c"), title="one"), layouts(Rename("^b", "net.c"), title="other")
    message = r"net\.c\.weight: the adapter's name is that of several of the base's tensors: found a\.weight \(one\) or b\.weight \(other\)"
    with pytest.raises(AmbiguousError, match=message):
        seen(["net.c.weight"], ["a.weight", "b.weight"], None, *rules)
    found = seen(["b.weight"], ["a.weight", "b.weight"], None, *rules)
    assert where(found) == {"b.weight": Same("b.weight")}


def test_a_name_of_the_file_and_of_memory_is_refused_if_they_differ() -> None:
    swap = Group((Rename(r"\.fc0(?!\w)", ".fc1"), Rename(r"\.fc1(?!\w)", ".fc2")))
    base = ["l.0.fc0.weight", "l.0.fc1.weight"]
    with pytest.raises(AmbiguousError, match=r"found l\.0\.fc1\.weight \(as it is\) or l\.0\.fc0\.weight \(t\); give --rename OLD=NEW"):
        seen(["l.0.fc1.weight"], base, layouts(swap))
    assert where(seen(["l.0.fc0.weight"], base, layouts(swap))) == {"l.0.fc0.weight": Same("l.0.fc0.weight")}
    assert where(seen(["l.0.fc2.weight"], base, layouts(swap))) == {"l.0.fc2.weight": Same("l.0.fc1.weight")}


# -- what does not meet


def test_strays_are_told_under_the_view_with_the_fewest() -> None:
    known = layouts(Rename("^a", "c"))
    view, names, _ = seen(["c.0.weight", "c.9.weight"], ["a.0.weight", "b.weight"], known)
    assert view.title == "t" and "c.0.weight" in view.specs and "c.9.weight" not in view.specs
    view, names, _ = seen(["x.weight", "y.weight"], ["a.0.weight"], known)
    assert view.title == "" and names == {"x.weight": "x.weight", "y.weight": "y.weight"}


@pytest.mark.parametrize(
    ("names", "base", "message"),
    [
        (["l.0.q.weight"], ["l.0.qkv.weight"], r"l\.0\.q\.weight: transformers converts this tensor.*found l\.0\.qkv\.weight, by Chunk; "),
        (["l.0.qkv.weight"], ["l.0.q.weight"], r"l\.0\.qkv\.weight: transformers converts this tensor.*found l\.0\.q\.weight, by Chunk; "),
    ],
)  # fmt: skip
def test_what_transformers_converts_is_refused_by_name(names: list[str], base: list[str], message: str) -> None:
    view, _, _ = seen(names, base, layouts(Other((r"\.qkv(?!\w)",), (".q", ".k"), "Chunk")))
    with pytest.raises(UnsupportedError, match=message):
        raise view.refused[names[0]]


def test_a_stack_that_is_incomplete_is_told() -> None:
    view, _, _ = seen(["model.layers.0.mlp.experts.down"], [name for name in SINGLE if name != SINGLE[1]], layouts(*STACKS))
    with pytest.raises(MatchError, match="the base lacks a matrix of this stack: found none of expert 0"):
        raise view.refused["model.layers.0.mlp.experts.down"]


def test_an_ambiguous_prefix_is_an_error_only_where_no_layout_helps() -> None:
    base = ["encoder.a.weight", "decoder.a.weight"]
    with pytest.raises(LoratoolsError, match="under several prefixes"):
        seen(["a.weight"], base)
    with pytest.raises(LoratoolsError, match="under several prefixes"):
        seen(["a.weight"], base, layouts(Rename("^other", "x")))
    assert where(seen(["a.weight"], base, layouts(Rename("^decoder.a", "a")))) == {"a.weight": Same("decoder.a.weight")}


def test_files_that_lie_both_ways_are_known_as_such() -> None:
    turning = layouts(Other((r"down(?!\w)",), ("down",), "Transpose"))
    for names in (["l.down"], ["model.l.down"]):
        assert seen(names, ["l.down"], turning)[0].turns("l.down")
    assert not seen(["l.down"], ["l.down"])[0].turns("l.down")
