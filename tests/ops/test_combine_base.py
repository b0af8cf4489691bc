"""combine with a base: DoRA and whatever is no difference, as Σ wᵢ·(applyᵢ(W) − W) in dense float64; names, heads, saved tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas.base import Bound, Delta, Read
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, MatchError, NotExpressible, OptionError, QuantizedError, UnsupportedError
from loratools.formats import load
from loratools.ops.combine import combine
from loratools.ops.merge import merge
from loratools.refs import Spec
from loratools.tensors import read_tensor, to_ref
from tests.files import llama_config, read_checkpoint, write_checkpoint
from tests.ops._lora import SHAPES, checked, dense, low, rows_of

NAME = "h.0.up.weight"
FULL = 1000  # a rank that no matrix here has
FLOAT32 = 2e-7  # of ‖D‖: factors of full rank rounded to float32


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS = {name: randn(*shape, seed=len(name)).float() for name, (shape, _) in SHAPES.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    others = {"h.0.up.bias": torch.ones(20), "head.weight": torch.ones(4, 7), "experts.up.weight": torch.ones(2, 3, 4)}
    return write_checkpoint(tmp_path / "base", {**WEIGHTS, **others})


def dora(name: str, seed: int) -> DoRA:
    """DoRA whose magnitudes are those of W within a tenth, along peft's axis for the layer."""
    shape, layer = SHAPES[name]
    W = WEIGHTS[name].double().flatten(1)
    norms = W.norm(dim=0, keepdim=True) if layer == "embedding" else W.norm(dim=1, keepdim=True)
    norms = norms * (1 + 0.1 * randn(*norms.shape, seed=seed))
    magnitude = norms if layer == "embedding" else norms.reshape(-1, *[1] * (len(shape) - 1))
    return DoRA(direction=low(shape, 3, seed, layer=layer), magnitude=to_ref(magnitude.float()))


def changed(name: str, delta: Delta) -> Tensor:
    """applyᵢ(W) − W by the papers' formulas."""
    W = WEIGHTS[name].double().flatten(1)
    if not isinstance(delta, DoRA):
        return dense(delta)
    V = W + dense(delta)
    m = read_tensor(delta.magnitude, torch.float64).flatten(1)
    return m * V / V.norm(dim=0 if m.shape[0] == 1 else 1, keepdim=True) - W


@pytest.mark.parametrize("rank", [1, 5, FULL])
@pytest.mark.parametrize("kinds", ["dora+dora", "dora+lora", "lora+dora+dora"])
def test_the_sum_of_what_each_makes_of_the_weight(tmp_path: Path, base: Path, kinds: str, rank: int) -> None:
    """Linear, Conv2d and Embedding, in every order: against dense float64, the error beside the best, every delta counted."""
    make: dict[str, Callable[[str, int], Delta]] = {
        "dora": dora, "lora": lambda name, seed: low(SHAPES[name][0], 4, seed, layer=SHAPES[name][1]),
    }  # fmt: skip
    given = [
        (Adapter(deltas={name: make[kind](name, seed) for name in SHAPES}), weight)
        for seed, (kind, weight) in enumerate(zip(kinds.split("+"), (0.7, -0.5, 1.0), strict=False))
    ]
    receipt = checked(combine(given, tmp_path / "out", base=base, rank=rank), tmp_path / "out")
    assert receipt["applied"] == receipt["expected"] == len(given) * len(SHAPES)
    found = load(tmp_path / "out")
    for name, row in rows_of(receipt).items():
        wanted = sum((weight * changed(name, one[name]) for one, weight in given), torch.zeros(()))
        norm, error = float(wanted.norm()), float((dense(found[name]) - wanted).norm())
        best = float(torch.linalg.svdvals(wanted)[rank:].norm())
        assert row["kind"] == "+".join(dict.fromkeys(kinds.split("+"))) and row["adapters"] == len(given)
        assert error <= (1 + 1e-4) * best + FLOAT32 * norm
        assert row["error"] * norm == pytest.approx(error, rel=1e-6, abs=1e-9 * norm)
        assert row["optimal_error"] * norm <= best + 1e-9 * norm
        assert row["optimal_error"] * norm >= best / (1 + 1e-4) - 1e-6 * norm


def test_merged_it_is_the_merge_of_all(tmp_path: Path, base: Path) -> None:
    """At full rank, into the same base: merge takes the adapters one by one, and its arithmetic is another."""
    one, other = Adapter(deltas={name: dora(name, 0) for name in SHAPES}), Adapter(deltas={NAME: dora(NAME, 1)})
    combine([(one, 0.7), (other, -0.4)], tmp_path / "both", base=base, rank=FULL)
    for index, (given, weight) in enumerate(((one, 0.7), (other, -0.4))):
        combine([given], tmp_path / f"saved{index}")
        assert weight
    merge(base, tmp_path / "both", tmp_path / "once", dtype="float64")
    merge(base, [f"{tmp_path}/saved0:0.7", f"{tmp_path}/saved1:-0.4"], tmp_path / "twice", dtype="float64")
    once, twice = read_checkpoint(tmp_path / "once"), read_checkpoint(tmp_path / "twice")
    for name, W in once.items():
        assert torch.allclose(W, twice[name], atol=1e-6 * float(W.norm())), name


def test_what_is_additive_stays_exact(tmp_path: Path, base: Path) -> None:
    """A module that no DoRA touches goes through the factors, whatever the rest takes, and keeps its bytes where it is alone."""
    plain = low((12, 12), 4, 7)
    given = [(Adapter(deltas={NAME: dora(NAME, 0)}), 1.0), (Adapter(deltas={"h.0.q_proj.weight": plain}), 1.0)]
    receipt = combine(given, tmp_path / "out", base=base, max_error=0.2)
    rows = rows_of(receipt)
    assert rows[NAME]["rank"] > 3 and 0 < rows[NAME]["error"] <= 0.2  # DoRA alone at weight 1, but beside LoRA
    kept = load(tmp_path / "out")["h.0.q_proj.weight"]
    assert isinstance(kept, LowRank) and rows["h.0.q_proj.weight"]["error"] <= 0.2


def test_dora_alone_keeps_its_magnitude_where_all_is_dora(tmp_path: Path, base: Path) -> None:
    given = [Adapter(deltas={NAME: dora(NAME, 0)}), Adapter(deltas={"h.0.q_proj.weight": dora("h.0.q_proj.weight", 1)})]
    combine(given, tmp_path / "out", base=base)
    found = load(tmp_path / "out")
    assert all(isinstance(delta, DoRA) for delta in found.values()) and len(found) == 2
    with pytest.raises(NotExpressible, match=r"DoRA on h\.0\.up\.weight, plain LoRA on h\.0\.q_proj\.weight"):
        combine([given[0], Adapter(deltas={"h.0.q_proj.weight": low((12, 12), 2, 0)})], tmp_path / "mixed")


@pytest.mark.parametrize("method", ["ties", "dare-linear", "magnitude-prune"])
def test_methods_prune_what_dora_makes(tmp_path: Path, base: Path, method: str) -> None:
    from tests.ops.test_combine_methods import oracle

    given = [(Adapter(deltas={NAME: dora(NAME, seed)}), weight) for seed, weight in ((0, 1.0), (1, -0.5))]
    combine(given, tmp_path / "out", base=base, method=method, density=0.4, rank=FULL)
    stored = [(Adapter(deltas={NAME: Full(diff=to_ref(changed(NAME, one[NAME])))}), weight) for one, weight in given]
    wanted = oracle(stored, NAME, method, density=0.4)
    assert torch.allclose(dense(load(tmp_path / "out")[NAME]), wanted, atol=FLOAT32 * float(wanted.norm()))


@dataclass(frozen=True, eq=False, kw_only=True)
class Scaled(Delta):
    """W′ = f·W, a kind that nothing here knows."""

    kind = "scaled"
    factor: float

    def spec(self, base: Spec | None) -> Spec:
        assert base is not None
        return base

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        return lambda part, W: W.mul_(self.factor)  # type: ignore[union-attr]


def test_a_kind_of_its_own(tmp_path: Path, base: Path) -> None:
    given = [(Adapter(deltas={NAME: Scaled(factor=1.5)}), 0.5), (Adapter(deltas={NAME: low((20, 7), 2, 0)}), 1.0)]
    receipt = combine(given, tmp_path / "out", base=base, rank=FULL)
    wanted = 0.25 * WEIGHTS[NAME].double() + dense(given[1][0][NAME])
    assert torch.allclose(dense(load(tmp_path / "out")[NAME]), wanted, atol=FLOAT32 * float(wanted.norm()))
    assert rows_of(receipt)[NAME]["rank_before"] is None
    with pytest.raises(UnsupportedError, match=r"a scaled delta is no difference .* give --base"):
        combine(given, tmp_path / "other", rank=2)


def test_a_bias_that_is_no_difference_becomes_one(tmp_path: Path, base: Path) -> None:
    """b′ = 1.5·b is b + 0.5·b exactly: a vector needs no factors."""
    given = Adapter(deltas={NAME: Scaled(factor=1.5), "h.0.up.bias": Scaled(factor=1.5)})
    receipt = checked(combine([(given, -0.4)], tmp_path / "out", base=base, rank=FULL), tmp_path / "out")
    found = load(tmp_path / "out")["h.0.up.bias"]
    assert isinstance(found, Full) and torch.allclose(dense(found), torch.full((20,), -0.2, dtype=torch.float64), atol=1e-8)
    assert receipt["applied"] == 2 and rows_of(receipt)["h.0.up.bias"]["rank"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_tensor_at_another_weight(tmp_path: Path, base: Path, dtype: torch.dtype) -> None:
    """W + w·(V − W), saved whole again in V's dtype; with LoRA on it too."""
    value = randn(4, 7, seed=1).to(dtype)
    saved = Adapter(deltas={"head.weight": Replacement(value=to_ref(value)), NAME: low((20, 7), 2, 0)})
    receipt = checked(combine([(saved, 0.3)], tmp_path / "out", base=base), tmp_path / "out")
    kept = load(tmp_path / "out")["head.weight"]
    assert isinstance(kept, Replacement) and rows_of(receipt)["head.weight"]["rank"] is None
    expected = 1 + 0.3 * (value.double() - 1)
    assert torch.equal(read_tensor(kept.value), expected.to(dtype))
    table = torch.ones(30, 9) / 3
    then = low((30, 9), 2, 0, layer="embedding")
    chain = Adapter(deltas={"wte.weight": Chain(first=Replacement(value=to_ref(table)), then=then)})
    combine([(chain, 0.5)], tmp_path / "chain", base=base)
    kept = load(tmp_path / "chain")["wte.weight"]
    W = WEIGHTS["wte.weight"].double()
    assert isinstance(kept, Replacement)
    assert torch.equal(read_tensor(kept.value), (W + 0.5 * (table.double() + dense(then) - W)).float())


def test_the_base_is_in_the_receipt(tmp_path: Path, base: Path) -> None:
    receipt = checked(combine([Adapter(deltas={NAME: low((20, 7), 2, 0)})], tmp_path / "out", base=base), tmp_path / "out")
    merged = merge(base, tmp_path / "out", tmp_path / "merged")
    assert receipt["inputs"][0] == merged["inputs"][0] and receipt["arguments"]["base"] == str(base)


def test_names_are_aligned_with_the_base(tmp_path: Path, base: Path) -> None:
    given = [Adapter(deltas={f"model.{NAME}": low((20, 7), 2, 0)}), Adapter(deltas={NAME: low((20, 7), 2, 1)})]
    receipt = combine(given, tmp_path / "out", base=base)
    assert list(load(tmp_path / "out")) == [NAME] and receipt["applied"] == 2
    assert any("prefix 'model.' removed" in note for note in receipt["notes"])


def test_a_tied_head_that_is_not_on_disk(tmp_path: Path) -> None:
    """Its weight is the embedding's: DoRA on it is computed from that."""
    W = randn(17, 8, seed=0).float()
    tensors = {"model.embed_tokens.weight": W, "model.norm.weight": torch.ones(8)}
    tied = write_checkpoint(tmp_path / "tied", tensors, llama_config(tie_word_embeddings=True))
    magnitude = W.double().norm(dim=1, keepdim=True) * 1.1
    head = DoRA(direction=low((17, 8), 2, 0, layer="linear"), magnitude=to_ref(magnitude))
    combine([(Adapter(deltas={"lm_head.weight": head}), 0.5)], tmp_path / "out", base=tied, rank=FULL)
    V = W.double() + dense(head)
    wanted = 0.5 * (magnitude * V / V.norm(dim=1, keepdim=True) - W)
    assert torch.allclose(dense(load(tmp_path / "out")["lm_head.weight"]), wanted, atol=FLOAT32 * float(wanted.norm()))


def refused() -> list[tuple[list[tuple[Adapter, float]], dict[str, Any], type[LoratoolsError], str]]:
    stack = Adapter(deltas={"experts.up.weight": Scaled(factor=2.0)})
    return [
        ([(Adapter(deltas={NAME: dora(NAME, 0)}), 0.5)], {}, OptionError, r"h\.0\.up\.weight: this change has no small factors.*--rank"),
        ([(Adapter(deltas={"nowhere.weight": low((20, 7), 2, 0)}), 1.0)], {}, MatchError, r"none of the adapter's 1 weights"),
        ([(stack, 0.5)], {"rank": 2}, UnsupportedError, r"experts\.up\.weight: what becomes of it has no low-rank form: a stack"),
    ]


@pytest.mark.parametrize("index", range(3))
def test_what_the_base_cannot_settle(tmp_path: Path, base: Path, index: int) -> None:
    given, words, error, message = refused()[index]
    with pytest.raises(error, match=message):
        combine(given, tmp_path / "out", base=base, **words)
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    tensors = {NAME: torch.zeros(20, 7, dtype=torch.uint8)}
    quantised = write_checkpoint(tmp_path / "q", tensors, {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(QuantizedError, match="the base's weights are quantised"):
        combine([Adapter(deltas={NAME: low((20, 7), 2, 0)})], tmp_path / "out", base=quantised)


def test_the_base_is_no_place_for_the_output(tmp_path: Path, base: Path) -> None:
    with pytest.raises(OSError, match="is, holds or lies inside the input"):
        combine([Adapter(deltas={NAME: low((20, 7), 2, 0)})], base / "out", base=base)


def test_progress_is_told_in_bytes_of_dense_changes(tmp_path: Path, base: Path) -> None:
    seen: list[tuple[int, int]] = []
    given = Adapter(deltas={NAME: dora(NAME, 0), "h.0.q_proj.weight": dora("h.0.q_proj.weight", 1)})
    combine([(given, 0.5)], tmp_path / "out", base=base, rank=2, threads=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(560, 1136), (1136, 1136)]
