"""Where tensors lie: stacks and their matrices, deltas taken apart and put together, and what makes no stack."""

from __future__ import annotations

import pytest
import torch

from loratools.deltas.compose import Stacked
from loratools.deltas.experts import Experts
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parts import Joined
from loratools.deltas.scaled import Scaled
from loratools.errors import MatchError, UnsupportedError
from loratools.layouts.places import Fused, Same, Where, Within, collected, inside, put
from loratools.layouts.rules import Place
from loratools.refs import Spec
from loratools.tensors import read_tensor, to_ref
from tests.strategies import low_rank, randn

E, I, H = 2, 3, 4  # noqa: E741
GATE, UP = Spec("BF16", (I, H)), Spec("BF16", (I, H))
PLACES = {f"{e}.{name}": Place("gate_up", e, part, 2) for e in range(E) for part, name in enumerate(("gate", "up"))}
BASE = dict.fromkeys(PLACES, GATE)
STACK = Fused((("0.gate", 0, 0, 3), ("0.up", 0, 3, 6), ("1.gate", 1, 0, 3), ("1.up", 1, 3, 6)))


def test_a_stack_is_what_its_matrices_make() -> None:
    found = collected(PLACES | {"q": Place("p")}, BASE | {"q": Spec("F32", (5,))})
    assert found.where == {"gate_up": STACK, "p": Same("q")} and found.faults == {}
    assert found.specs == {"gate_up": Spec("BF16", (E, 2 * I, H)), "p": Spec("F32", (5,))}
    backwards = collected(dict(reversed(PLACES.items())), BASE)
    assert backwards.where == {"gate_up": STACK}


def test_parts_may_be_of_different_height() -> None:
    base = {name: Spec("F32", (3 if "gate" in name else 5, H)) for name in PLACES}
    found = collected(PLACES, base)
    assert found.specs["gate_up"] == Spec("F32", (E, 8, H))
    assert found.where["gate_up"] == Fused((("0.gate", 0, 0, 3), ("0.up", 0, 3, 8), ("1.gate", 1, 0, 3), ("1.up", 1, 3, 8)))


@pytest.mark.parametrize(
    ("places", "base", "message"),
    [
        ({name: PLACES[name] for name in PLACES if name != "1.up"}, BASE, "lacks a matrix of this stack: found none of expert 1 like 0.up"),
        ({name: PLACES[name] for name in PLACES if "up" not in name}, BASE, "lacks a matrix of this stack: found none of expert 0, part 1"),
        ({name: PLACES[name] for name in PLACES if name[0] == "1"}, BASE, "found none of expert 0 like 1.gate"),
        (PLACES, BASE | {"1.up": Spec("BF16", (I, H + 1))}, r"make no stack: found 1.up BF16 \[3, 5\], expected BF16 \[3, 4\]"),
        (PLACES, BASE | {"1.up": Spec("F32", (I, H))}, "make no stack: found 1.up F32"),
        (PLACES, dict.fromkeys(PLACES, Spec("F32", (I, H, 1))), "make no stack"),
        (PLACES, dict.fromkeys(PLACES, Spec("F32", ())), "make no stack"),
        (PLACES | {"x": Place("gate_up")}, BASE | {"x": Spec("F32", (1,))}, "go by this name in memory: found x, 0.gate"),
        (
            PLACES | {"x": PLACES["1.up"]},
            BASE | {"x": GATE},
            "several of the base's tensors go by this name in memory: found 1.up, x",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_stack_is_told(places: dict[str, Place], base: dict[str, Spec], message: str) -> None:
    found = collected(places, base)
    assert "gate_up" not in found.where and "gate_up" not in found.specs
    with pytest.raises(MatchError, match=message):
        raise found.faults["gate_up"]


def test_a_name_of_three_tensors_stays_refused() -> None:
    found = collected({name: Place("a") for name in "xyz"}, dict.fromkeys("xyz", GATE))
    assert found.where == {} and set(found.faults) == {"a"}


def test_a_matrix_of_a_stack() -> None:
    spec = Spec("BF16", (E, 2 * I, H))
    assert inside(Place("s", 1, 1, 2), Same("s"), spec) == (Within("s", 9, 12), UP)
    assert inside(Place("s", 1, 0, 1), Same("s"), spec) == (Within("s", 6, 12), Spec("BF16", (6, H)))
    assert inside(Place("s", 1, 1, 2), STACK, spec) == (Same("1.up"), UP)
    for place in (Place("s", 2, 0, 2), Place("s", 1, 0, 4), Place("s", 1, 0, 5)):
        assert inside(place, Same("s"), spec) is None and inside(place, STACK, spec) is None
    assert inside(Place("s", 0, 0, 2), Same("s"), Spec("F32", (6, H))) is None
    assert inside(Place("s", 0, 0, 2), Within("s", 0, 3), spec) is None


def dense(delta: LowRank) -> torch.Tensor:
    return delta.scaling * read_tensor(delta.B, torch.float64) @ read_tensor(delta.A, torch.float64)


def test_an_experts_delta_is_taken_apart() -> None:
    A, B = to_ref(randn(2 * E, H, seed=1)), to_ref(randn(2 * I, 2 * E, seed=2))
    delta = Experts(A=A, B=B, alpha=2.0, experts=E)
    placed, faults = put({"gate_up": delta}, {"gate_up": STACK})
    assert faults == [] and list(placed) == ["0.gate", "0.up", "1.gate", "1.up"]
    whole = delta.bind_dense(Spec("F64", delta.shape()))(slice(0, E * 2 * I)).reshape(E, 2 * I, H)
    for name, expert, start, stop in STACK.matrices:
        low = placed[name]
        assert isinstance(low, LowRank) and torch.allclose(dense(low), whole[expert, start:stop], rtol=0, atol=1e-14)


def test_a_stack_of_members_is_taken_apart() -> None:
    member = low_rank((6, 4), 2, 1).delta
    assert isinstance(member, LowRank)
    placed, faults = put({"gate_up": Stacked(members=(None, member))}, {"gate_up": STACK})
    assert faults == [] and list(placed) == ["1.gate", "1.up"]
    for name, rows in (("1.gate", slice(0, 3)), ("1.up", slice(3, 6))):
        low = placed[name]
        assert isinstance(low, LowRank) and torch.equal(dense(low), dense(member)[rows])
    other = Stacked(members=(Full(diff=to_ref(torch.ones(6, 4))), member))
    assert isinstance(put({"gate_up": other}, {"gate_up": STACK})[1][0], UnsupportedError)


def test_saved_and_dense_stacks_are_taken_apart() -> None:
    stack = torch.arange(float(E * 2 * I * H)).reshape(E, 2 * I, H)
    placed, _ = put({"a": Replacement(value=to_ref(stack), new=False), "b": Full(diff=to_ref(stack), scale=0.5)}, {"a": STACK})
    assert set(placed) == {*PLACES, "b"}
    for name, expert, start, stop in STACK.matrices:
        part = placed[name]
        assert isinstance(part, Replacement) and not part.new
        assert torch.equal(read_tensor(part.value), stack[expert, start:stop])
    placed, _ = put({"b": Full(diff=to_ref(stack), scale=0.5)}, {"b": STACK})
    for name, expert, start, stop in STACK.matrices:
        full = placed[name]
        assert isinstance(full, Full) and full.scale == 0.5 and torch.equal(read_tensor(full.diff), stack[expert, start:stop])


def test_matrices_are_put_together() -> None:
    one, other = low_rank((3, 4), 2, 1).delta, low_rank((3, 4), 2, 5).delta
    where: dict[str, Where] = {"a": Within("s", 9, 12), "b": Within("s", 0, 3), "c": Same("t")}
    placed, faults = put({"a": one, "b": other, "c": one, "new": one}, where)
    assert faults == [] and list(placed) == ["t", "new", "s"] and placed["t"] is one and placed["new"] is one
    stack = placed["s"]
    assert isinstance(stack, Joined) and [(part.start, part.delta) for part in stack.parts] == [(0, other), (9, one)]


def test_what_cannot_be_taken_apart_or_meets_another_is_a_fault() -> None:
    low = low_rank((3, 4), 2, 1).delta
    _, faults = put({"gate_up": Scaled(l=to_ref(torch.ones(2)))}, {"gate_up": STACK})
    assert [str(fault) for fault in faults] == ["gate_up: an (IA)³ delta on a stack that the base stores matrix by matrix"]
    flat = Replacement(value=to_ref(torch.ones(12, 4)))
    assert isinstance(put({"gate_up": flat}, {"gate_up": STACK})[1][0], UnsupportedError)
    for where in ({"a": Same("t"), "b": Same("t")}, {"a": Within("t", 0, 3), "b": Same("t")}):
        _, faults = put({"a": low, "b": low}, where)
        assert [str(fault) for fault in faults] == ["t: two of the adapter's deltas lie on this tensor"]
