"""Experts: peft's two einsums in float64, both packings, block by block, and one expert at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.experts import Experts
from loratools.errors import NonFiniteError, ShapeError
from loratools.refs import Spec
from loratools.tensors import read_tensor, to_ref
from tests.strategies import randn

E, R, OUT, IN = 5, 3, 4, 6
A, B = randn(E * R, IN, seed=1), randn(OUT, R * E, seed=2)


def experts(**more: object) -> Experts:
    return Experts(**({"A": to_ref(A), "B": to_ref(B), "alpha": 6.0, "experts": E} | more))  # type: ignore[arg-type]


def peft(*, turned: bool, packing: str) -> Tensor:
    """The difference as peft 0.21.2 spells it (get_delta_weight), and Unsloth's packing as `B.view(out, E, r)`."""
    a = A.double().reshape(E, R, IN)
    b = B.double().reshape(OUT, R, E) if packing == "rank_major" else B.double().reshape(OUT, E, R).transpose(1, 2)
    return torch.einsum("o r e, e r i -> e i o" if turned else "o r e, e r i -> e o i", b, a) * (6.0 / R)


@pytest.mark.parametrize("packing", ["rank_major", "grouped_by_expert"])
@pytest.mark.parametrize("turned", [False, True])
@given(step=st.integers(1, 20))
def test_it_is_pefts_difference(turned: bool, packing: str, step: int) -> None:
    delta, wanted = experts(turned=turned, packing=packing), peft(turned=turned, packing=packing)
    base = Spec("F64", tuple(wanted.shape))
    assert delta.spec(base) == base and delta.shape() == base.shape
    rows, columns = delta.matrix(base)
    dense = delta.bind_dense(base)
    found = torch.cat([dense(slice(start, min(start + step, rows))).clone() for start in range(0, rows, step)])
    assert torch.allclose(found, wanted.reshape(rows, columns), rtol=0, atol=1e-14)
    assert torch.equal(found, delta.bind_dense(base)(slice(0, rows)))
    assert delta.norm() == pytest.approx(float(wanted.norm()), rel=1e-12)


@pytest.mark.parametrize("packing", ["rank_major", "grouped_by_expert"])
@pytest.mark.parametrize("turned", [False, True])
def test_one_expert_is_lora_on_its_matrix(turned: bool, packing: str) -> None:
    delta, wanted = experts(turned=turned, packing=packing), peft(turned=turned, packing=packing)
    for index in range(E):
        for rows in (slice(None), slice(0, 2), slice(2, 4)):
            low = delta.expert(index, rows)
            part = wanted[index][rows]
            assert low.shape() == tuple(part.shape) and low.rank == R and low.layer == "linear"
            found = low.scaling * read_tensor(low.B, torch.float64) @ read_tensor(low.A, torch.float64)
            assert torch.allclose(found, part, rtol=0, atol=1e-14)


def test_the_packings_differ_in_values_and_not_in_norms() -> None:
    one, other = experts(), experts(packing="grouped_by_expert")
    assert not torch.allclose(peft(turned=False, packing="rank_major"), peft(turned=False, packing="grouped_by_expert"))
    assert one.spec(Spec("F32", (E, OUT, IN))) == other.spec(Spec("F32", (E, OUT, IN)))


def test_the_rank_is_an_experts_own() -> None:
    assert experts().facts() == {"rank": R, "alpha": 6.0, "scaling": 6.0 / R, "experts": E}
    assert experts(rslora=True).scaling == 6.0 / math.sqrt(R)
    assert experts().parameters == A.numel() + B.numel()


@pytest.mark.parametrize("shape", [(E, IN, OUT), (E + 1, OUT, IN), (E * OUT, IN), (E, OUT, IN, 1)])
def test_other_stacks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="does not fit the base's weight"):
        experts().spec(Spec("F32", shape))
    assert not experts().fits(Spec("F32", shape))


@pytest.mark.parametrize(
    "wrong",
    [
        {"experts": 4}, {"experts": 2 * E * R}, {"A": to_ref(A[:-R])}, {"A": to_ref(A.reshape(E, R, IN))},
        {"A": to_ref(A[:0]), "B": to_ref(B[:, :0])},
    ],
)  # fmt: skip
def test_factors_of_other_experts_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ShapeError, match="not the factors of so many experts"):
        experts(**wrong)


def test_a_value_that_is_not_finite_is_an_error() -> None:
    broken = A.clone()
    broken[7, 1] = math.inf
    dense = experts(A=to_ref(broken)).bind_dense(Spec("F32", (E, OUT, IN)))
    dense(slice(0, 2 * OUT))
    with pytest.raises(NonFiniteError, match="inf or nan"):
        dense(slice(2 * OUT, 3 * OUT))
