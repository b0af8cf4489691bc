"""resize: optimal against the dense float64 SVD, exact when it grows, within what was asked for, and honest about what is stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter import Adapter
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import MatchError, NonFiniteError, OptionError
from loratools.formats import load
from loratools.ops.extract import extract
from loratools.ops.resize import resize
from loratools.tensors import read_tensor, to_ref
from tests.files import peft_config, raw, read_adapter, write_adapter, write_checkpoint
from tests.ops._lora import SHAPES, adapters, checked, dense, low, rows_of, size

NAME = "h.0.up.weight"
FLOAT64 = 1e-13  # of Σ‖bₖ‖‖aₖ‖: what float64 QR and SVD of a dozen components leave, a few hundred units of 1.1e-16


def tail(delta: LowRank, rank: int) -> float:
    """The least error of a rank, by the dense float64 SVD."""
    return float(torch.linalg.svdvals(dense(delta))[rank:].norm())


@settings(max_examples=40)
@given(adapters(), st.integers(1, 14))
def test_a_rank_is_optimal_or_exact(tmp_path_factory: pytest.TempPathFactory, given: Adapter, rank: int) -> None:
    out = tmp_path_factory.mktemp("r") / "out"
    receipt = checked(resize(given, out, rank=rank), out)
    found = load(out)
    assert receipt["applied"] == receipt["expected"] == len(given) == len(found)
    for name, row in rows_of(receipt).items():
        before, after = given[name], found[name]
        assert isinstance(before, LowRank) and isinstance(after, LowRank)
        assert after.rank == rank == row["rank"] and row["rank_before"] == before.rank
        assert after.scaling == pytest.approx(before.scaling, rel=1e-15)
        norm, error = float(dense(before).norm()), float((dense(after) - dense(before)).norm())
        noise = FLOAT64 * size(before)
        if rank >= before.rank:
            assert error <= noise and row["error"] == 0
            continue
        # float32 factors add 3.6e-8 of ‖ΔW‖ (√2 · 2⁻²⁴ / √12, ten times for the few large elements of a small matrix), at right
        # angles to what the truncation leaves
        assert error <= math.hypot(tail(before, rank), 1e-7 * norm) + noise
        if tail(before, rank) > 1e-4 * norm:
            assert error <= (1 + 1e-6) * tail(before, rank) + noise
        assert row["error"] * norm == pytest.approx(error, rel=1e-6, abs=noise)
        assert row["optimal_error"] * norm == pytest.approx(tail(before, rank), rel=1e-6, abs=noise)
        assert row["energy"] == pytest.approx(1 - row["error"] ** 2)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_growing_keeps_every_bit(tmp_path: Path, dtype: torch.dtype, rslora: bool) -> None:
    given = Adapter(
        deltas={name: low(shape, 3, 0, layer=layer, alpha=5.0, dtype=dtype, rslora=rslora) for name, (shape, layer) in SHAPES.items()}
    )
    resize(given, tmp_path / "out", rank=16)
    found = load(tmp_path / "out")
    for name, delta in given.items():
        after = found[name]
        assert isinstance(delta, LowRank) and isinstance(after, LowRank)
        for one, other in ((delta.A, after.A), (delta.B.T, after.B.T)):
            kept, grown = read_tensor(one), read_tensor(other)
            assert raw(grown[:3]) == raw(kept) and not bool(grown[3:].any())
        assert after.scaling == delta.scaling
    back = resize(found, tmp_path / "back", rank=3)
    assert max(row["error"] for row in back["tensors"]) <= {torch.float32: 1e-7, torch.bfloat16: 5e-3}[dtype]  # the dtype's rounding


@settings(max_examples=25)
@given(adapters(dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64)), st.sampled_from([0.5, 0.1, 1e-2, 1e-5]))
def test_the_error_asked_for_is_kept_as_stored(tmp_path_factory: pytest.TempPathFactory, given: Adapter, limit: float) -> None:
    out = tmp_path_factory.mktemp("e") / "out"
    receipt = checked(resize(given, out, max_error=limit), out)
    found = load(out)
    for name, row in rows_of(receipt).items():
        before = given[name]
        assert isinstance(before, LowRank)
        norm = float(dense(before).norm())
        error = float((dense(found[name]) - dense(before)).norm())
        noise = FLOAT64 * size(before)
        assert error <= (limit + 3e-7) * norm + noise  # 1e-7 twice: the floor of a float32 error
        assert row["error"] * norm == pytest.approx(error, rel=1e-4, abs=noise)
        if row["rank"] > 1 and before.A.spec.dtype == "F32" and limit > 1e-4:
            assert tail(before, row["rank"] - 1) > (limit - 1e-6) * norm - noise  # no lower rank would do


def test_energy_is_the_square(tmp_path: Path) -> None:
    given = Adapter(deltas={NAME: low((20, 7), 7, 3, spectrum="steep")})
    for energy, error in ((0.9, math.sqrt(0.1)), (1.0, 1e-7)):
        (row,) = resize(given, tmp_path / f"out{energy}", energy=energy)["tensors"]
        assert row["energy"] >= energy - 1e-12 and row["error"] <= error
    copies = Adapter(deltas={NAME: low((20, 7), 6, 3, spectrum="degenerate")})
    (row,) = resize(copies, tmp_path / "all", energy=1.0)["tensors"]
    assert (row["rank_before"], row["rank"]) == (6, 3) and row["error"] < 1e-7  # half of the components were copies


def steep(count: int = 4) -> Adapter:
    deltas = {f"h.{i}.up.weight": low((40, 24), 12, i, spectrum=("steep", "random")[i % 2], alpha=2.0 + i) for i in range(count)}
    return Adapter(deltas=dict(deltas))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("bytes_", [5000, 8000, 11111])
def test_a_size_is_one_budget_and_the_best_for_it(tmp_path: Path, bytes_: int, dtype: str | None) -> None:
    given = steep()
    receipt = checked(resize(given, tmp_path / "out", size=bytes_, dtype=dtype), tmp_path / "out")
    file = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    per_rank = (40 + 24) * (2 if dtype else 4)
    ranks = {name: row["rank"] for name, row in rows_of(receipt).items()}
    assert file <= bytes_
    # every σ² that was taken is at least as large as any that was not, all modules' ranks costing the same
    sigma = {name: torch.linalg.svdvals(dense(given[name])) for name in given}
    taken = min(float(sigma[name][rank - 1]) for name, rank in ranks.items() if rank > 1)
    left = max((float(sigma[name][rank]) for name, rank in ranks.items() if rank < 12), default=0.0)
    assert taken >= left and (file + per_rank + 64 > bytes_ or set(ranks.values()) == {12})


def test_sizes_at_both_ends(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"--size is too small for rank 1 in every module: found 100 bytes, expected at least (\d+) bytes"
    ) as error:
        resize(steep(), tmp_path / "out", size=100)
    least = int(str(error.value.expected).split()[2])
    assert {row["rank"] for row in resize(steep(), tmp_path / "least", size=least)["tensors"]} == {1}
    assert (tmp_path / "least" / "adapter_model.safetensors").stat().st_size == least
    whole = resize(steep(), tmp_path / "whole", size="1MB")
    assert {(row["rank"], row["error"]) for row in whole["tensors"]} == {(12, 0.0)}


@pytest.mark.parametrize(("dtype", "unit"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8), ("float64", 2.0**-53)])
def test_another_dtype_states_its_rounding(tmp_path: Path, dtype: str, unit: float) -> None:
    given = Adapter(deltas={NAME: low((20, 7), 4, 3), "conv.weight": low((8, 4, 3, 3), 6, 1, layer="conv")})
    for rank in (2, 6):  # truncated, and the conv's own factors cast
        receipt = resize(given, tmp_path / f"out{rank}", rank=rank, dtype=dtype)
        found = load(tmp_path / f"out{rank}")
        assert {ref.spec.dtype for delta in found.values() for ref in delta.refs().values()} == {
            dtype.replace("bfloat", "BF").replace("float", "F")
        }
        for name, row in rows_of(receipt).items():
            norm, error = float(dense(given[name]).norm()), float((dense(found[name]) - dense(given[name])).norm())
            assert row["error"] * norm == pytest.approx(error, rel=1e-6, abs=1e-13 * norm)
            assert error <= row["optimal_error"] * norm + 2 * unit * norm + 1e-13 * norm  # two factors, each rounded by half a unit
    assert rows_of(receipt)["conv.weight"]["optimal_error"] == 0


def test_float16_moves_its_range_into_alpha(tmp_path: Path) -> None:
    given = Adapter(deltas={NAME: low((20, 7), 4, 0, spectrum="badly scaled")})
    (row,) = resize(given, tmp_path / "out", rank=3, dtype="float16")["tensors"]
    assert row["error"] < 2e-3 and row["scaling"] != given[NAME].scaling  # type: ignore[attr-defined]


def test_resizing_an_extraction_is_extracting_at_that_rank(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(24, 16, generator=generator), "b.weight": torch.randn(16, 24, generator=generator)}
    tuned = {name: W + 0.1 * torch.randn(W.shape, generator=generator) for name, W in base.items()}
    paths = write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "tuned", tuned)
    extract(*paths, tmp_path / "large", rank=8, exact=True)
    extract(*paths, tmp_path / "small", rank=5, exact=True)
    receipt = checked(resize(tmp_path / "large", tmp_path / "out", rank=5), tmp_path / "out")
    assert [entry["operation"] for entry in receipt["history"]] == ["extract"]
    one, other = load(tmp_path / "out"), load(tmp_path / "small")
    for name in base:
        # both are D's best rank 5 but for the rounding of 5 and 8 factors to float32, which the gap after σ₅ (a few per cent) amplifies
        assert torch.allclose(dense(one[name]), dense(other[name]), atol=1e-5 * float(dense(other[name]).norm()))


def test_dora_biases_and_saved_tensors_come_along(tmp_path: Path) -> None:
    weight = low((20, 7), 5, 0, alpha=3.0)
    bias, saved = torch.randn(20), torch.randn(9, 7)
    embedding = Chain(first=Replacement(value=to_ref(torch.randn(30, 9))), then=low((30, 9), 4, 1, layer="embedding", alpha=3.0))
    given = Adapter(
        deltas={
            NAME: weight, "h.0.up.bias": Full(diff=to_ref(bias), scale=weight.scaling), "head.weight": Replacement(value=to_ref(saved)),
            "wte.weight": embedding,
        }
    )  # fmt: skip
    receipt = checked(resize(given, tmp_path / "out", rank=2), tmp_path / "out")
    found = load(tmp_path / "out")
    assert receipt["applied"] == 4 and {row["name"] for row in receipt["tensors"]} == {NAME, "wte.weight"}
    assert torch.allclose(dense(found["h.0.up.bias"]), dense(given["h.0.up.bias"]), rtol=1e-15)
    tensors = read_adapter(tmp_path / "out")[0]
    assert raw(tensors["base_model.model.h.0.up.lora_B.bias"]) == raw(bias) and raw(tensors["base_model.model.head.weight"]) == raw(saved)
    magnitude = torch.rand(20, 1) + 1
    dora = Adapter(deltas={NAME: DoRA(direction=weight, magnitude=to_ref(magnitude))})
    told = checked(resize(dora, tmp_path / "dora", size=1500), tmp_path / "dora")
    after = load(tmp_path / "dora")[NAME]
    assert isinstance(after, DoRA) and raw(read_tensor(after.magnitude)) == raw(magnitude)
    assert any("ΔV" in note for note in told["notes"]) and told["tensors"][0]["kind"] == "dora"
    error = float((dense(after) - dense(weight)).norm() / dense(weight).norm())
    assert told["tensors"][0]["error"] == pytest.approx(error, rel=1e-6)


def test_the_same_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    for count in (1, 3):
        resize(steep(), tmp_path / f"out{count}", energy=0.8, threads=count)
    one, other = ((tmp_path / f"out{count}" / "adapter_model.safetensors").read_bytes() for count in (1, 3))
    assert one == other


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"rank": True}, {"energy": 0}, {"energy": 1.1}, {"max_error": 1}, {"size": "big"},
     {"rank": 2, "dtype": "int8"}],
)  # fmt: skip
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        resize(steep(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_to_resize(tmp_path: Path) -> None:
    with pytest.raises(MatchError, match="no low-rank module"):
        resize(Adapter(deltas={"head.weight": Replacement(value=to_ref(torch.ones(2, 2)))}), tmp_path / "out", rank=1)


def test_a_factor_that_is_not_finite_is_named_with_its_file(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.up.lora_A.weight": torch.ones(2, 7),
        "base_model.model.up.lora_B.weight": torch.full((20, 2), float("nan")),
    }
    path, out = write_adapter(tmp_path / "given", tensors, peft_config(target_modules=["up"])), tmp_path / "out"
    with pytest.raises(NonFiniteError, match=r"adapter_model\.safetensors: up\.weight: a factor holds inf or nan"):
        resize(path, out, rank=1)
    assert not out.exists()
