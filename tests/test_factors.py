"""Factors of a dense difference: which tensors have a low-rank form, errors as written, alpha made up for, float16's range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loratools.deltas.lowrank import LowRank
from loratools.errors import NonFiniteError
from loratools.factors import How, factor, form_of, reach, residual_norm
from loratools.families import Family
from loratools.refs import Spec

GPT2 = Family({"model_type": "gpt2"})
# family, tensor, spec, layer or None
FORMS = [
    ({}, "model.layers.0.q_proj.weight", (8, 4), "linear"),
    ({}, "model.embed_tokens.weight", (8, 4), "embedding"),
    ({"model_type": "gpt2"}, "h.0.attn.c_attn.weight", (4, 12), "transposed"),
    ({"model_type": "llama"}, "h.0.attn.c_attn.weight", (4, 12), "linear"),
    ({}, "conv.weight", (8, 4, 3), "conv"),
    ({}, "conv.weight", (8, 4, 3, 3), "conv"),
    ({}, "conv.weight", (8, 4, 3, 3, 3), "conv"),
    ({}, "conv.weight", (8, 4, 1, 1, 1, 1), None),
    # depthwise, or of one input channel: not told apart
    ({}, "conv.weight", (8, 1, 3, 3), None),
    # experts, by their name or by the config's count
    ({}, "mlp.experts.weight", (4, 8, 8), None),
    ({"num_local_experts": 4}, "moe.input_linear.weight", (4, 8, 8), None),
    ({"text_config": {"num_experts": 4}}, "moe.input_linear.weight", (4, 8, 8), None),
    ({"num_experts_per_tok": 4}, "conv.weight", (4, 8, 8), "conv"),
    ({}, "norm.weight", (8,), None),
    ({}, "q_proj.bias", (8,), None),
    ({}, "scale", (), None),
    # a matrix that is no module's weight
    ({}, "visual.proj", (8, 4), None),
]


@pytest.mark.parametrize(("config", "name", "shape", "layer"), FORMS)
def test_form(config: dict[str, object], name: str, shape: tuple[int, ...], layer: str | None) -> None:
    found, reason = form_of(name, Spec("F32", shape), Family(config))
    assert found == layer
    assert (reason == "") == (layer is not None)


def test_whole_numbers_have_no_low_rank_form() -> None:
    assert form_of("q.weight", Spec("I8", (8, 4)), Family({})) == (None, "not floating point")


def matrix(rows: int, columns: int, *, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Singular values falling as 1/k."""
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    U, V = (torch.linalg.qr(torch.randn(n, size, generator=generator, dtype=torch.float64)).Q for n in (rows, columns))
    return (U * scale / torch.arange(1, size + 1)) @ V.T


def best(D: Tensor, rank: int) -> float:
    return float(torch.linalg.vector_norm(torch.linalg.svdvals(D.double())[rank:]))


def dense(delta: LowRank) -> Tensor:
    B, A = delta.factors()
    return delta.scaling * B @ A


@pytest.mark.parametrize("code", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("alpha", [None, 16.0, 0.3])
def test_the_error_is_that_of_the_factors_as_written(code: str, alpha: float | None) -> None:
    D = matrix(40, 30)
    found = factor(D, 5, How(code=code, alpha=alpha), shape=(40, 30), layer="linear")
    true = float((D - dense(found.delta)).norm())
    assert found.error == pytest.approx(true, rel=1e-9)  # both from float64 products
    assert found.optimal <= best(D, 5) <= true * (1 + 1e-12)
    assert found.delta.alpha == (alpha or 5)
    assert found.delta.A.spec.dtype == found.delta.B.spec.dtype == code
    # rounding adds √2·u to a rank-5 part of norm about 1.2 (numerics: 2⁻¹² for float16, 2⁻⁹ for bfloat16)
    unit = {"F64": 2**-53, "F32": 2**-24, "F16": 2**-11, "BF16": 2**-8}[code]
    assert true <= math.hypot(best(D, 5) * (1 + 1e-12), 2 * unit * float(D.norm()))


def test_factors_are_balanced_and_fall() -> None:
    found = factor(matrix(40, 30), 6, How(code="F64"), shape=(40, 30), layer="linear").delta
    B, A = found.factors()
    expected = 1 / torch.arange(1, 7, dtype=torch.float64)
    # σ of the Gram route: good to 1e-8 of the largest
    assert torch.allclose(B.square().sum(0), expected, atol=1e-7)
    assert torch.allclose(A.square().sum(1), expected, atol=1e-7)


def test_a_convolution_gets_its_kernel_back() -> None:
    found = factor(matrix(8, 36), 3, How(), shape=(8, 4, 3, 3), layer="conv").delta
    assert found.A.spec.shape == (3, 4, 3, 3)
    assert found.B.spec.shape == (8, 3)
    assert found.shape() == (8, 4, 3, 3)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0, 1e6, 1e12])
def test_float16_moves_a_power_of_two_into_alpha(scale: float) -> None:
    D = matrix(40, 30, scale=scale)
    found = factor(D, 5, How(code="F16"), shape=(40, 30), layer="linear")
    # as good as at scale 1: within rounding, where subnormals would leave nothing
    assert found.error <= math.hypot(best(D, 5), 2 * 2**-11 * float(D.norm()))
    assert math.frexp(found.delta.scaling)[0] == 0.5  # a power of two
    assert (found.delta.scaling == 1) == (scale in (1.0, 1e6))  # entries of about 0.2 and 200 are well inside the range


def test_factors_beyond_the_dtype_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="float16"):
        factor(matrix(40, 30, scale=1e12), 5, How(code="F16", alpha=5), shape=(40, 30), layer="linear")
    with pytest.raises(NonFiniteError):
        factor(matrix(40, 30, scale=1e80), 5, How(), shape=(40, 30), layer="linear")


@pytest.mark.parametrize("fraction", [0.9, 0.3, 0.05])
@pytest.mark.parametrize("code", ["F32", "BF16"])
def test_reach_takes_the_least_rank_that_stays_within(fraction: float, code: str) -> None:
    D = matrix(40, 30)
    found = reach(D, fraction, How(code=code), shape=(40, 30), layer="linear")
    assert found is not None
    assert float((D - dense(found.delta)).norm()) <= (fraction + 1e-7) * float(D.norm())
    assert found.delta.rank == 1 or best(D, found.delta.rank - 1) > 0.999 * fraction * float(D.norm())


def test_reach_counts_what_rounding_adds() -> None:
    # σ = 1 and 0.01: rank 1 has an error of 0.01, of which bfloat16's rounding (about 0.002) takes too much for 0.01001
    D = torch.diag(torch.tensor([1.0, 0.01] + [0.0] * 28, dtype=torch.float64))
    Q = torch.linalg.qr(matrix(30, 30) + torch.eye(30)).Q
    D = Q @ D @ Q.T
    assert reach(D, 0.01001, How(), shape=(30, 30), layer="linear").delta.rank == 1  # type: ignore[union-attr]
    found = reach(D, 0.01001, How(code="BF16"), shape=(30, 30), layer="linear")
    assert found is not None
    assert found.delta.rank == 2
    assert found.error <= 0.01001 * found.norm


def test_no_rank_of_bfloat16_factors_reaches_a_thousandth() -> None:
    assert reach(matrix(40, 30), 1e-4, How(code="BF16"), shape=(40, 30), layer="linear") is None


def test_all_of_the_energy_is_the_rank_to_working_precision() -> None:
    D = matrix(40, 30)
    D = (D @ D.T)[:, :7] @ matrix(7, 30)
    found = reach(D, 0.0, How(), shape=(40, 30), layer="linear")
    assert found is not None
    assert found.delta.rank == 7


def test_the_bound_is_lowered_by_what_the_difference_was_rounded() -> None:
    D = matrix(40, 30)
    plain = factor(D, 5, How(), shape=(40, 30), layer="linear")
    lowered = factor(D, 5, How(), shape=(40, 30), layer="linear", rounding=0.125)
    assert lowered.optimal == plain.optimal - 0.125


def test_residual_norm_in_blocks() -> None:
    D, B, A = matrix(700, 500), matrix(700, 3), matrix(3, 500)
    assert residual_norm(D, B, A, 2.0) == pytest.approx(float((D - 2 * B @ A).norm()), rel=1e-13)
