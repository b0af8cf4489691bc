"""Which parameter a wrapper is about, how many experts, and which axis A reads: told by sizes, order, version and model, or an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from loratools.deltas.base import Delta
from loratools.deltas.experts import Experts
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parameters import Choice, OnParameter, moved, names_of, settle_parameters
from loratools.errors import AmbiguousError, Faults, LoratoolsError, MatchError, ShapeError, raise_all
from loratools.refs import InMemory, Spec

M = "model.layers.0.mlp.experts"
E, H, I = 4, 16, 12  # noqa: E741
GATE_UP, DOWN = Spec("F32", (E, 2 * I, H)), Spec("F32", (E, H, I))
BASE = {f"{M}.gate_up_proj": GATE_UP, f"{M}.down_proj": DOWN}
BOTH = ("gate_up_proj", "down_proj")


def on(a: int, b: int, depth: int = 0, rows: int = 2 * E, names: Iterable[str] = BOTH, **more: object) -> OnParameter:
    """A wrapper of factors A (rows, a), B (b, rows)."""
    choices = more.pop("choices", None) or tuple(Choice(f"{M}.{name}", 4.0, 2) for name in names)
    A, B = InMemory(Spec("F32", (rows, a)), b""), InMemory(Spec("F32", (b, rows)), b"")
    return OnParameter(**{"A": A, "B": B, "module": M, "depth": depth, "choices": choices, "version": "0.21.2"} | more)  # type: ignore[arg-type]


def nested(inner: tuple[int, int], outer: tuple[int, int], **more: object) -> dict[str, Delta]:
    return {f"{M}.gate_up_proj": on(*inner, 1, **more), f"{M}.down_proj": on(*outer, **more)}  # type: ignore[arg-type]


def settled(
    deltas: Mapping[str, Delta], base: Mapping[str, Spec] = BASE, types: Iterable[str] = ("mixtral",), **more: object
) -> dict[str, Delta]:
    found, faults = settle_parameters(deltas, base, types, **more)  # type: ignore[arg-type]
    raise_all(faults)
    assert all(found[name].spec(base[name]) == base[name] for name in found if name in base)
    return found


def way(delta: Delta) -> bool:
    assert isinstance(delta, Experts)
    return delta.turned


def test_sizes_tell_the_parameter_and_the_axis() -> None:
    found = settled(nested((H, 2 * I), (I, H)))
    assert list(found) == [f"{M}.gate_up_proj", f"{M}.down_proj"]
    assert [way(delta) for delta in found.values()] == [False, False]
    for version, types in (("0.18.0", ["mixtral"]), (None, []), ("0.21.2", []), ("0.21.2", ["gpt_oss"])):
        found = settled(nested((2 * I, H), (H, I), version=version), types=types)
        assert [way(delta) for delta in found.values()] == [True, True]


@pytest.mark.parametrize(("version", "way"), [("0.21.2", 1), ("0.18.0", 0)])
def test_the_axis_of_another_version_is_refused(version: str, way: int) -> None:
    """Such a file peft does not load either: A and B were exchanged."""
    sizes = [((H, 2 * I), (I, H)), ((2 * I, H), (H, I))][way]
    message = rf"gate_up_proj: peft {version} has A read the other axis.*on \[4, 24, 16\]; if another version wrote it, remove peft_version"
    with pytest.raises(LoratoolsError, match=message):
        settled(nested(*sizes, version=version))
    assert len(settled(nested(*sizes, version=None))) == 2
    assert len(settled(nested(*sizes, version=version), either=lambda name: True)) == 2


@pytest.mark.parametrize(
    ("a", "b", "name"), [(H, 2 * I, "gate_up_proj"), (I, H, "down_proj"), (2 * I, H, "gate_up_proj"), (H, I, "down_proj")]
)
def test_a_single_wrapper_is_about_the_parameter_that_it_fits(a: int, b: int, name: str) -> None:
    assert list(settled({f"{M}.gate_up_proj": on(a, b, version=None)})) == [f"{M}.{name}"]


def test_each_parameter_has_the_alpha_and_rank_of_its_name() -> None:
    choices = (Choice(f"{M}.gate_up_proj", 4.0, 2), Choice(f"{M}.down_proj", 9.0, 3))
    deltas = {"a": on(H, 2 * I, 1, choices=choices), "b": on(I, H, rows=3 * E, choices=choices)}
    assert [(delta.facts()["alpha"], delta.facts()["rank"]) for delta in settled(deltas).values()] == [(4.0, 2), (9.0, 3)]
    with pytest.raises(ShapeError, match=r"down_proj: the rank of each of 4 experts is not the config's: found 2, expected 3"):
        settled({"a": on(H, 2 * I, 1, choices=choices), "b": on(I, H, choices=choices)})


def test_two_of_one_size_follow_the_order_of_registration() -> None:
    """Experts without a gate: up and down take each other's factors turned, and squares any."""
    for width in (I, H):
        base = {f"{M}.up_proj": Spec("F32", (E, width, H)), f"{M}.down_proj": Spec("F32", (E, H, width))}
        both = ("down_proj", "up_proj")
        deltas = {"x": on(H, width, 1, names=both, rslora=True), "y": on(width, H, names=both)}
        found = settled(deltas, base)
        assert [(name, delta.rslora) for name, delta in found.items() if isinstance(delta, Experts)] == [
            (f"{M}.up_proj", True),
            (f"{M}.down_proj", False),
        ]


def test_an_unknown_order_of_one_size_is_refused() -> None:
    base = {f"{M}.{name}": Spec("F32", (E, H, H + 1)) for name in ("one", "two")}
    deltas = {"x": on(H + 1, H, 1, names=("one", "two")), "y": on(H + 1, H, names=("one", "two"))}
    with pytest.raises(AmbiguousError, match=r"fit several parameters of the module: found .*one, .*two; save an adapter for each"):
        settled(deltas, base)


@pytest.mark.parametrize(
    ("deltas", "base"),
    [
        (nested((I, H), (H, 2 * I)), BASE),
        (
            {"x": on(I, H, 1, names=("up_proj", "down_proj")), "y": on(H, I, names=("up_proj", "down_proj"))},
            {f"{M}.up_proj": Spec("F32", (E, I, H)), f"{M}.down_proj": DOWN},
        ),
    ],
    ids=["gated", "without a gate"],
)
def test_wrappers_nested_the_other_way_round_are_refused(deltas: dict[str, Delta], base: dict[str, Spec]) -> None:
    with pytest.raises(ShapeError, match=r"nested the other way round: found .*down_proj innermost, expected .*up_proj, which the model"):
        settled(deltas, base)


# -- squares


@pytest.mark.parametrize(("version", "types", "turned"), [("0.18.1", [], True), ("0.21.2", ["mixtral"], False), ("0.21.2", [], None)])
def test_the_version_and_the_model_tell_the_axis_of_a_square(version: str, types: list[str], turned: bool | None) -> None:
    deltas = {"a": on(H, H, names=("down_proj",), version=version)}
    base = {f"{M}.down_proj": Spec("F32", (E, H, H))}
    if turned is None:
        with pytest.raises(AmbiguousError, match=r"a stack of squares, and nothing tells which of its axes A reads.*add the peft_version"):
            settled(deltas, base, types)
    else:
        assert way(settled(deltas, base, types)[f"{M}.down_proj"]) is turned


@pytest.mark.parametrize(("sizes", "turned"), [((H, 2 * H), False), ((2 * H, H), True)])
def test_a_square_lies_as_what_is_no_square_of_its_kind_of_module(sizes: tuple[int, int], turned: bool) -> None:
    """gpt_oss' down_proj is a square, its gate_up_proj is not; transformers 4 did not say that both are stored (in, out)."""
    base = {f"{M}.gate_up_proj": Spec("F32", (E, 2 * H, H)), f"{M}.down_proj": Spec("F32", (E, H, H))}
    for version, types in (("0.21.2", ["gpt_oss"]), ("0.18.0" if turned else "0.21.2", ["mixtral"]), (None, [])):
        found = settled(nested(sizes, (H, H), version=version), base, types)
        assert [way(delta) for delta in found.values()] == [turned, turned]
    other = M.replace(".0.", ".11.")
    choices = (Choice(f"{other}.down_proj", 4.0, 2),)
    deltas = nested(sizes, (H, H), version=None) | {f"{other}.down_proj": on(H, H, module=other, choices=choices, version=None)}
    assert way(settled(deltas, base | {f"{other}.down_proj": Spec("F32", (E, H, H))})[f"{other}.down_proj"]) is turned


def test_a_model_whose_files_lie_both_ways_needs_such_a_sign() -> None:
    base = {f"{M}.down_proj": Spec("F32", (E, H, H))}
    with pytest.raises(AmbiguousError, match="a stack of squares"):
        settled({"a": on(H, H, names=("down_proj",))}, base, either=lambda name: name.endswith("down_proj"))


# -- matrices, one expert


def test_a_matrix_is_plain_lora_as_it_is_stored() -> None:
    base = {f"{M}.gate_up_proj_bias": Spec("F32", (E, 2 * I)), f"{M}.router": Spec("F32", (H, H))}
    found = settled({"a": on(2 * I, E, rows=2, names=("gate_up_proj_bias",))}, base)[f"{M}.gate_up_proj_bias"]
    assert isinstance(found, LowRank) and found.layer == "linear" and found.rank == 2
    square = settled({"a": on(H, H, rows=2, names=("router",), version=None)}, base, [])[f"{M}.router"]
    assert isinstance(square, LowRank) and square.layer == "linear"
    with pytest.raises(ShapeError, match="A and B do not fit the parameter"):
        settled({"a": on(E, 2 * I, rows=2, names=("gate_up_proj_bias",))}, base)


def test_a_stack_of_one_is_not_turned() -> None:
    """peft adds B·A as it is where there is one expert, whatever the model."""
    base = {f"{M}.down_proj": Spec("F32", (1, H, H))}
    found = settled({"a": on(H, H, rows=2, names=("down_proj",), version="0.17.0")}, base, ["gpt_oss"])[f"{M}.down_proj"]
    assert isinstance(found, Experts) and found.experts == 1 and not found.turned
    with pytest.raises(ShapeError, match="A and B do not fit the parameter"):
        settled({"a": on(H, I, rows=2, names=("down_proj",))}, {f"{M}.down_proj": Spec("F32", (1, H, I))})


def test_a_layers_weight_may_be_meant_where_every_module_is() -> None:
    choices = (Choice(f"{M}.weight", 8.0, 2, plain=True), Choice(f"{M}.down_proj", 4.0, 2))
    for base, kind in (({f"{M}.weight": Spec("F32", (H, I))}, LowRank), ({f"{M}.down_proj": DOWN}, Experts)):
        found = settled({f"{M}.weight": on(I, H, rows=2 if kind is LowRank else 2 * E, choices=choices)}, base)
        assert isinstance(found[next(iter(base))], kind)


# -- what does not fit


@pytest.mark.parametrize(
    ("deltas", "base", "error", "message"),
    [
        ({"a": on(H, 2 * I, rows=7)}, BASE, ShapeError, r"gate_up_proj: A has not as many rows for each expert: found A \[7, 16\]"),
        ({"a": on(H + 1, 2 * I)}, BASE, ShapeError, r"gate_up_proj: A and B do not fit the parameter: found A \[8, 17\]"),
        (nested((H, 2 * I), (I, H + 1)), BASE, ShapeError, r"down_proj: A and B do not fit the parameter"),
        ({"a": on(H, 2 * I, rows=3 * E)}, BASE, ShapeError, r"each of 4 experts is not the config's: found 3, expected 2"),
        (nested((H, 2 * I), (I, H)), {f"{M}.down_proj": DOWN}, MatchError, r"2 adapters on parameters of one module: found"),
        ({"a": on(H, 2 * I)}, {f"{M}.gate_up_proj": Spec("F32", (2 * I,))}, ShapeError, "LoRA on a parameter is for matrices and stacks"),
    ],
)  # fmt: skip
def test_what_fits_no_parameter_is_an_error(
    deltas: dict[str, Delta], base: dict[str, Spec], error: type[LoratoolsError], message: str
) -> None:
    with pytest.raises(error, match=message):
        settled(deltas, base)
    assert not [name for name, delta in settle_parameters(deltas, base, ["mixtral"])[0].items() if isinstance(delta, OnParameter)]


def test_all_modules_faults_are_told_together() -> None:
    other = M.replace(".0.", ".1.")
    deltas = {"a": on(H + 1, 2 * I), "b": on(H + 1, 2 * I, module=other, choices=(Choice(f"{other}.gate_up_proj", 4.0, 2),))}
    with pytest.raises(Faults) as caught:
        settled(deltas, BASE | {f"{other}.gate_up_proj": GATE_UP})
    assert len(caught.value.errors) == 2


def test_what_the_base_has_nothing_of_stays_as_it_is() -> None:
    delta, low = on(H, 2 * I), LowRank(A=InMemory(Spec("F32", (2, 3)), b""), B=InMemory(Spec("F32", (4, 2)), b""), alpha=1.0)
    found = settled({"a": delta, "q.weight": low}, {"q.weight": Spec("F32", (4, 3))})
    assert found == {"a": delta, "q.weight": low}
    for call in (lambda: delta.spec(None), lambda: delta.bind(None, lambda rows: iter(()))):
        with pytest.raises(AssertionError, match="resolve the adapter first"):
            call()


def test_its_names_move_together() -> None:
    delta = moved(on(H, 2 * I), f"{M}.gate_up_proj", "x.w13")
    assert isinstance(delta, OnParameter) and [choice.name for choice in delta.choices] == ["x.w13", "x.down_proj"]
    low = LowRank(A=InMemory(Spec("F32", (2, 3)), b""), B=InMemory(Spec("F32", (4, 2)), b""), alpha=1.0)
    assert moved(low, "a", "b") is low and moved(delta, "a", "a") is delta
    assert names_of("a", delta) == ("x.w13", "x.down_proj") and names_of("a", low) == ("a",)


def test_facts_are_those_that_all_choices_share() -> None:
    assert on(H, I).facts() == {"rank": 2, "alpha": 4.0}
    choices = (Choice("a", 4.0, 2), Choice("b", 9.0, 3))
    assert on(H, I, choices=choices).facts() == {"rank": None, "alpha": None}
