"""convert: formats byte for byte; kinds against dense float64 algebra, optimal and exact where they can be; what is never dropped."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Chain, Part, Stacked
from loratools.deltas.dora import DoRA
from loratools.deltas.flat import FlatDoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import TurnedAdditive, Unsettled, WherePresent
from loratools.deltas.loha import LoHa
from loratools.deltas.lokr import LoKr
from loratools.deltas.lowrank import LowRank
from loratools.deltas.scaled import Scaled
from loratools.errors import (
    AmbiguousError,
    LoratoolsError,
    MatchError,
    NonFiniteError,
    NotExpressible,
    OptionError,
    QuantizedError,
    UnsupportedError,
)  # fmt: skip
from loratools.formats import load, save
from loratools.ops.convert import convert
from loratools.ops.inspect import inspect
from loratools.ops.merge import merge
from loratools.refs import Ref
from loratools.tensorfile import TensorFile
from loratools.tensors import read_tensor, to_ref
from tests.deltas.apply import applied
from tests.files import peft_config, raw, read_checkpoint, write_adapter, write_checkpoint
from tests.ops._lora import SPECTRA, adapters, checked, low, rows_of
from tests.strategies import randn

U32 = 2.0**-24
# a layer's word: the shape of its weight as it is stored, and the axis of its magnitudes there as peft has them
LAYERS = {"linear": (14, 9), "square": (11, 11), "conv": (8, 3, 2, 2), "embedding": (23, 6), "transposed": (7, 12)}
AXIS = {"embedding": 0, "transposed": 0}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer_of(word: str) -> str:
    return "linear" if word == "square" else word


def weight(word: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows and columns of different sizes, as trained weights have them."""
    shape = LAYERS[word]
    W = randn(*shape, seed=seed) * (1 + randn(shape[0], *(1,) * (len(shape) - 1), seed=seed + 1).abs())
    return W.to(dtype)


def base_of(folder: Path, W: Tensor, name: str = "m.weight", **more: Tensor) -> Path:
    return write_checkpoint(folder / "base", {name: W, **more})


def in_memory(delta: Delta, name: str = "m.weight", **more: Delta) -> Adapter:
    return Adapter({name: delta, **more})


def dora_of(lora: LowRank, W: Tensor, word: str, drift: float = 0.05, *, axis: int | None = None, seed: int = 5) -> DoRA:
    """A DoRA over a LoRA, its magnitudes the norms of W moved a little, along peft's axis of the layer or another."""
    side = AXIS.get(word, 1) if axis is None else axis
    norm = W.double().flatten(1).norm(dim=side)
    m = norm * (1 + drift * randn(len(norm), seed=seed).double())
    shape = (1, -1) if side == 0 else (-1, *(1,) * (W.ndim - 1))
    return DoRA(direction=lora, magnitude=to_ref(m.float().reshape(shape)))


def dora_algebra(delta: DoRA, W: Tensor) -> Tensor:
    """W′ by the paper's formula in float64."""
    low = delta.direction
    assert isinstance(low, LowRank)
    B, A = read_tensor(low.B, torch.float64), read_tensor(low.A, torch.float64).flatten(1)
    V = W.double().flatten(1) + low.scaling * torch.einsum("or,ri->oi", B, A)
    m = read_tensor(delta.magnitude, torch.float64).flatten(1)
    return (m * V / V.norm(dim=0 if delta.axis == "in" else 1, keepdim=True)).reshape(W.shape)


def only(out: Path) -> Delta:
    return load(out)["m.weight"]


def tail(D: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(D.flatten(1))[rank:].norm())


# -- formats


@settings(max_examples=15)
@given(adapters(dtypes=(torch.float32, torch.bfloat16)))
def test_a_change_of_format_keeps_every_byte(tmp_path_factory: pytest.TempPathFactory, given: Adapter) -> None:
    folder = tmp_path_factory.mktemp("f")
    save(given, folder / "peft")
    receipt = checked(convert(folder / "peft", folder / "own.safetensors", format="loratools"), folder / "own.safetensors")
    convert(folder / "own.safetensors", folder / "again", format="peft")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "peft" / file).read_bytes() == (folder / "again" / file).read_bytes()
    assert receipt["applied"] == receipt["expected"] == len(given) and receipt["tensors"] == []
    stored = {raw(tensor) for tensor in load_file(folder / "peft/adapter_model.safetensors").values()}
    back = load(folder / "own.safetensors")
    for delta in back.values():
        assert isinstance(delta, LowRank)
        factors = (delta.B, delta.A) if delta.layer != "embedding" else (delta.A.T, delta.B.T)
        assert all(bytes(ref.read()) in stored for ref in factors)


@pytest.mark.parametrize("format", ["peft", "kohya", "comfyui", "diffusers", "loratools"])
def test_the_digests_are_of_the_files_as_they_lie(tmp_path: Path, format: str) -> None:
    """Also where the header tells digests of the tensors, and is written after them; of what went in, and beside writeback."""
    root = f"base_model.model.{'diffusion_model' if format == 'comfyui' else 'unet'}.mid"
    tensors = {f"{root}.{n}.lora_A.weight": randn(6, 9 + n, seed=n) for n in range(3)}
    tensors |= {f"{root}.{n}.lora_B.weight": randn(60_000, 6, seed=n) for n in range(3)}  # more than a block each
    write_adapter(tmp_path / "a", tensors, peft_config(r=6))
    receipt = convert(tmp_path / "a", tmp_path / "b", format=format)
    for rows, folder in ((receipt["inputs"], Path()), (receipt["outputs"], tmp_path / "b")):
        assert rows
        for row in rows:
            data = (folder / row["path"]).read_bytes()
            assert (row["bytes"], row["blake3"]) == (len(data), blake3(data).hexdigest())
            header = data[8 : 8 + int.from_bytes(data[:8], "little")] if row["path"].endswith(".safetensors") else None
            assert row["header_sha256"] == (hashlib.sha256(header).hexdigest() if header is not None else None)
    (weights,) = (tmp_path / "b").glob("*.safetensors")
    assert receipt["digests"] == {name: blake3(bytes(ref.read())).hexdigest() for name, ref in TensorFile(weights).items()}


def test_the_format_that_was_read_is_the_default(tmp_path: Path) -> None:
    save(in_memory(low((4, 3), 1, 0)), tmp_path / "own.safetensors", format="loratools")
    convert(tmp_path / "own.safetensors", tmp_path / "again.safetensors")
    assert load(tmp_path / "again.safetensors").format == "loratools"
    save(in_memory(low((4, 3), 1, 0)), tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "out")
    assert load(tmp_path / "out").format == "peft"


def test_from_loralib_and_the_tutorial_with_what_their_files_lack(tmp_path: Path) -> None:
    torch.save({"q.lora_A": randn(2, 5, seed=0), "q.lora_B": randn(4, 2, seed=1)}, tmp_path / "loralib.pt")
    convert(tmp_path / "loralib.pt", tmp_path / "one", format="peft", alpha_in=6)
    found = load(tmp_path / "one")["q.weight"]
    assert isinstance(found, LowRank) and found.scaling == 3 and torch.equal(read_tensor(found.A), randn(2, 5, seed=0))
    torch.save({"q.lora.A": randn(5, 2, seed=0), "q.lora.B": randn(2, 4, seed=1)}, tmp_path / "tutorial.pt")
    convert(tmp_path / "tutorial.pt", tmp_path / "two", format="peft", alpha_in=6, scale="alpha")
    other = load(tmp_path / "two")["q.weight"]
    assert isinstance(other, LowRank) and other.scaling == 6 and torch.equal(read_tensor(other.A), randn(5, 2, seed=0).T)


def test_a_base_gives_the_names(tmp_path: Path) -> None:
    base = base_of(tmp_path, randn(4, 4, seed=0), "model.q.weight")
    save(in_memory(low((4, 4), 1, 0), "q.weight"), tmp_path / "peft")
    receipt = convert(tmp_path / "peft", tmp_path / "out", base=base)
    assert list(load(tmp_path / "out")) == ["model.q.weight"] and "prefix 'model.' added" in receipt["notes"][0]
    convert(tmp_path / "peft", tmp_path / "renamed", base=base, rename=["q=model.q"])
    assert list(load(tmp_path / "renamed")) == ["model.q.weight"]
    with pytest.raises(MatchError, match=r"other\.weight"):
        convert(in_memory(low((4, 4), 1, 0), "other.weight"), tmp_path / "no", base=base)


# -- LoRA to DoRA


drawn = st.fixed_dictionaries(
    {
        "word": st.sampled_from(list(LAYERS)), "rank": st.integers(1, 12), "seed": st.integers(0, 2**16), "dtype": st.sampled_from(DTYPES),
        "spectrum": st.sampled_from(SPECTRA), "alpha": st.sampled_from([1.0, 8.0, -2.5]), "rslora": st.booleans(),
    }
)  # fmt: skip


def lora_of(word: str, rank: int, seed: int, dtype: torch.dtype, spectrum: str, alpha: float, rslora: bool) -> LowRank:
    return low(LAYERS[word], rank, seed, layer=layer_of(word), spectrum=spectrum, dtype=dtype, alpha=alpha, rslora=rslora)


@settings(max_examples=40)
@given(drawn, st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([None, "in", "out"]))
def test_a_lora_as_a_dora_and_as_a_difference(
    tmp_path_factory: pytest.TempPathFactory, made: Mapping[str, Any], dtype: torch.dtype, axis: str | None
) -> None:
    """lora → dora → dense equals lora → dense, and W′ stays: only the magnitudes are rounded, to float32."""
    folder, lora, word = tmp_path_factory.mktemp("d"), lora_of(**made), made["word"]
    axis = None if word == "conv" else axis
    W = weight(word, made["seed"], dtype)
    base, out = base_of(folder, W), folder / "dora.safetensors"
    options: dict[str, Any] = {"base": base, "magnitude_axis": axis, "format": "loratools"}
    (row,) = checked(convert(in_memory(lora), out, kind="dora", **options), out)["tensors"]
    dora = only(out)
    assert isinstance(dora, DoRA) and dora.magnitude.spec.dtype == "F32"
    assert bytes(dora.refs()["A"].read()) == bytes(lora.A.read()) and bytes(dora.refs()["B"].read()) == bytes(lora.B.read())
    turned = word in AXIS
    assert dora.axis == ("in" if (axis == "in") != turned else "out")
    V, found = applied(lora, W), applied(dora, W)
    side = 0 if dora.axis == "in" else 1
    norm = V.flatten(1).norm(dim=side)
    off = (found - V).flatten(1).norm(dim=side)
    assert bool((off <= (U32 + 1e-14) * norm).all())  # half a unit of a float32 magnitude, and float64's own rounding
    change = float((V - W.double()).norm())
    if change:
        # the receipt's error is of the magnitudes alone; W′ itself is computed to 1e-15 of W
        assert row["error"] * change == pytest.approx(float((found - V).norm()), rel=1e-3, abs=1e-14 * float(V.norm()))
    assert (row["kind_before"], row["kind"], row["rank"], row["optimal_error"]) == ("lora", "dora", made["rank"], 0)

    # both as differences
    one, two = folder / "one.safetensors", folder / "two.safetensors"
    convert(out, one, kind="dense", base=base, dtype="float64")
    convert(in_memory(lora), two, kind="dense", base=base, dtype="float64")
    first, second = (only(path) for path in (one, two))
    assert isinstance(first, Full) and isinstance(second, Full) and first.shape() == W.shape
    diff = read_tensor(second.diff)
    assert float((diff - (V - W.double())).norm()) <= 1e-14 * float(V.norm() + W.double().norm())
    assert bool(((read_tensor(first.diff) - diff).flatten(1).norm(dim=side) <= (U32 + 1e-14) * norm).all())


def test_zero_lengths_are_named(tmp_path: Path) -> None:
    W = randn(6, 4, seed=0)
    W[2] = W[5] = 0
    lora = LowRank(A=to_ref(torch.ones(1, 4)), B=to_ref(torch.zeros(6, 1)), alpha=1.0, layer="linear")
    with pytest.raises(UnsupportedError, match=r"m\.weight: a row of W \+ ΔW is zero, which a DoRA divides by its length: found row 2, 5"):
        convert(in_memory(lora), tmp_path / "out", kind="dora", base=base_of(tmp_path, W))
    assert not (tmp_path / "out").exists()


# -- DoRA to a difference


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("word", LAYERS)
def test_merging_the_difference_is_merging_the_dora(tmp_path: Path, word: str, dtype: str) -> None:
    """W + (W′ − W) is W′ to a rounding of float64 (float32 for a base of 16 bits), so the merged bytes differ by one unit at most."""
    code = getattr(torch, dtype)
    W = weight(word, 3, code)
    dora = dora_of(low(LAYERS[word], 3, 0, layer=layer_of(word)), W, word)
    base = base_of(tmp_path, W)
    receipt = checked(convert(in_memory(dora), tmp_path / "dense.safetensors", kind="dense", base=base), tmp_path / "dense.safetensors")
    dense = only(tmp_path / "dense.safetensors")
    assert isinstance(dense, Full) and dense.diff.spec.dtype == ("F32" if code.itemsize == 2 else "F64")
    merge(base, in_memory(dora), tmp_path / "one")
    merge(base, load(tmp_path / "dense.safetensors"), tmp_path / "two")
    one, two = (read_checkpoint(tmp_path / name)["m.weight"].double() for name in ("one", "two"))
    unit = torch.finfo(code).eps
    assert bool(((one - two).abs() <= 1.01 * unit * torch.maximum(one.abs(), W.double().abs())).all())
    assert float((one != two).double().mean()) < (0.01 if code != torch.float64 else 1.01)  # a tie that float64 itself decides
    exact = dora_algebra(dora, W) - W.double()
    error = float((read_tensor(dense.diff, torch.float64) - exact).norm() / exact.norm())
    assert receipt["tensors"][0]["error"] == pytest.approx(error, abs=1e-13) and error < 2 * U32


def test_a_difference_of_any_kind(tmp_path: Path) -> None:
    """Kinds that are no differences, and combinators, become one; tensors saved whole and differences stay what they are."""
    W = {"a.weight": randn(6, 4, seed=0), "a.bias": randn(6, seed=1), "b.weight": randn(6, 4, seed=2), "e": randn(2, 3, 4, seed=3)}
    W |= {"h.weight": randn(5, 4, seed=4), "norm.weight": randn(4, seed=5)}
    base = write_checkpoint(tmp_path / "base", W)
    given = Adapter(
        {
            "a.weight": Scaled(l=to_ref(randn(6, seed=4))), "a.bias": Scaled(l=to_ref(randn(6, seed=4))),
            "b.weight": Part(delta=low((2, 4), 1, 0, layer="linear"), start=1, stop=3),
            "e": Stacked(members=(None, low((3, 4), 1, 1, layer="linear"))),
            "h.weight": Chain(first=Replacement(value=to_ref(randn(5, 4, seed=9))), then=low((5, 4), 1, 2, layer="linear")),
            "norm.weight": Full(diff=to_ref(randn(4, seed=3))),
        }
    )  # fmt: skip
    receipt = checked(convert(given, tmp_path / "out.safetensors", kind="dense", base=base), tmp_path / "out.safetensors")
    found = load(tmp_path / "out.safetensors")
    assert {name: delta.kind for name, delta in found.items()} == dict.fromkeys(given, "full") | {"h.weight": "chain"}
    assert set(rows_of(receipt)) == set(given) - {"norm.weight"}
    for name, delta in given.items():
        assert torch.allclose(applied(found[name], W[name]), applied(delta, W[name]), rtol=1e-14, atol=1e-14), name


# -- DoRA to LoRA


@settings(max_examples=30)
@given(drawn, st.integers(1, 14), st.sampled_from([1e-3, 0.05]))
def test_a_dora_as_a_lora_is_the_best_of_its_rank(
    tmp_path_factory: pytest.TempPathFactory, made: Mapping[str, Any], rank: int, drift: float
) -> None:
    folder, word = tmp_path_factory.mktemp("l"), made["word"]
    W = weight(word, made["seed"])
    dora = dora_of(lora_of(**made), W, word, drift)
    out = folder / "out.safetensors"
    (row,) = checked(convert(in_memory(dora), out, kind="lora", base=base_of(folder, W), rank=rank, format="loratools"), out)["tensors"]
    found, D = only(out), dora_algebra(dora, W) - W.double()
    assert isinstance(found, LowRank) and found.rank == row["rank"] == min(rank, *D.flatten(1).shape) and found.layer == layer_of(word)
    norm, best = float(D.norm()), tail(D, rank)
    error = float((applied(found, W) - W.double() - D).norm())
    # float32 factors add up to 1e-7 of ‖D‖ at right angles; W′ and W are subtracted to 1e-15 of W
    noise = 1e-13 * float(W.double().norm())
    assert error <= math.hypot(1.0001 * best, 1e-7 * norm) + noise
    assert row["error"] * norm == pytest.approx(error, rel=1e-6, abs=noise + 1e-9 * norm)
    assert row["optimal_error"] * norm <= best * (1 + 1e-9) + noise
    if best > 1e-4 * norm:
        assert row["optimal_error"] * norm == pytest.approx(best, rel=1e-4)
    V = applied(dora.direction, W)
    side = 0 if dora.axis == "in" else 1
    m = read_tensor(dora.magnitude, torch.float64).reshape(-1)
    g = (m / V.flatten(1).norm(dim=side)).reshape((1, -1) if side == 0 else (-1, 1))
    scaling = ((g - 1) * W.double().flatten(1)).norm()
    assert row["row_scaling"] * norm == pytest.approx(float(scaling), rel=1e-9, abs=noise)


def test_isolated_rows_cost_a_rank_each(tmp_path: Path) -> None:
    """Where magnitudes moved on three rows only, W′ − W has rank r + 3 and no more."""
    W = weight("linear")
    lora = low(LAYERS["linear"], 2, 0, layer="linear")
    m = applied(lora, W).norm(dim=1, keepdim=True)
    m[[1, 4, 7]] *= 1.3
    dora = DoRA(direction=lora, magnitude=to_ref(m))
    base = base_of(tmp_path, W)
    rows = [convert(in_memory(dora), tmp_path / f"{rank}", kind="lora", base=base, rank=rank)["tensors"][0] for rank in (4, 5)]
    assert rows[0]["error"] > 1e-3 and rows[1]["error"] < 1e-6
    (row,) = convert(in_memory(dora), tmp_path / "found", kind="lora", base=base, max_error=1e-5)["tensors"]
    assert row["rank"] == 5


@pytest.mark.parametrize(("options", "limit"), [({"max_error": 0.3}, 0.3), ({"energy": 0.9}, math.sqrt(0.1))])
def test_the_error_asked_for_is_kept(tmp_path: Path, options: dict[str, float], limit: float) -> None:
    W = weight("linear")
    dora = dora_of(low(LAYERS["linear"], 2, 0, layer="linear"), W, "linear", 0.3)
    (row,) = convert(in_memory(dora), tmp_path / "out", kind="lora", base=base_of(tmp_path, W), **options)["tensors"]  # type: ignore[arg-type]
    D = dora_algebra(dora, W) - W.double()
    assert row["error"] <= limit < tail(D, row["rank"] - 1) / float(D.norm())


def test_a_16_bit_output_states_its_own_rounding(tmp_path: Path) -> None:
    W = weight("linear")
    dora = dora_of(low(LAYERS["linear"], 2, 0, layer="linear"), W, "linear")
    (row,) = convert(in_memory(dora), tmp_path / "out", kind="lora", base=base_of(tmp_path, W), rank=9, dtype="bf16")["tensors"]
    assert only(tmp_path / "out").refs()["A"].spec.dtype == "BF16" and 1e-4 < row["error"] < 2.0**-7


def test_a_dora_on_a_saved_tensor_needs_no_base(tmp_path: Path) -> None:
    """The tutorial's file has its layers' weights: they are the W that decides."""
    W = weight("linear")
    dora = dora_of(low(LAYERS["linear"], 2, 0, layer="linear"), W, "linear")
    given = in_memory(Chain(first=Replacement(value=to_ref(W)), then=dora))
    for kind, options in (("lora", {"rank": 9}), ("dense", {})):
        convert(given, tmp_path / f"{kind}.safetensors", kind=kind, format="loratools", **options)  # type: ignore[arg-type]
        found = only(tmp_path / f"{kind}.safetensors")
        assert isinstance(found, Chain) and bytes(found.refs()["first.value"].read()) == raw(W)
        assert torch.allclose(applied(found, torch.zeros_like(W)), dora_algebra(dora, W), atol=1e-6)


# -- products


def loha(out: int, into: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> LoHa:
    shapes = {"w1_a": (out, rank), "w1_b": (rank, into), "w2_a": (out, rank), "w2_b": (rank, into)}
    return LoHa(**{name: to_ref(randn(*shape, seed=seed + i, dtype=dtype)) for i, (name, shape) in enumerate(shapes.items())}, scale=0.7)


def loha_algebra(delta: LoHa) -> Tensor:
    w = {name: read_tensor(ref, torch.float64) for name, ref in delta.refs().items()}
    return delta.scale * (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, 3, 20])
def test_a_product_is_exact_where_the_rank_allows(tmp_path: Path, rank: int | None, dtype: torch.dtype, turned: bool) -> None:
    given = loha(20, 15, 2, 0, dtype)
    delta: Delta = TurnedAdditive(delta=given) if turned else given
    dense = loha_algebra(given).T if turned else loha_algebra(given)
    W = torch.zeros(dense.shape)
    receipt = checked(convert(in_memory(delta), tmp_path / "out", kind="lora", base=base_of(tmp_path, W), rank=rank), tmp_path / "out")
    (row,), found = receipt["tensors"], load(tmp_path / "out").resolve({"m.weight": to_ref(W).spec})["m.weight"]
    assert row["rank"] == (3 if rank == 3 else 4) and row["kind_before"] == "loha"
    error = float((applied(found, W) - dense).norm() / dense.norm())
    assert row["error"] == pytest.approx(error, rel=1e-6, abs=1e-12)
    best = tail(dense, row["rank"]) / float(dense.norm())
    assert row["optimal_error"] == pytest.approx(best, rel=1e-9, abs=1e-14)
    assert error <= math.hypot(best, 1e-7)  # float32 factors
    assert [entry["role"] for entry in receipt["inputs"]] == ["base"]


def test_without_a_base_it_is_taken_for_a_linear_layers(tmp_path: Path) -> None:
    delta = loha(20, 15, 2, 0)
    receipt = convert(in_memory(Unsettled(delta=delta)), tmp_path / "out", kind="lora")
    assert "1 tensors are taken for linear layers' weights" in receipt["notes"][0]
    found = only(tmp_path / "out")
    assert isinstance(found, LowRank) and found.layer == "unknown" and found.rank == 4
    turned = convert(in_memory(Unsettled(delta=delta, transposed=True)), tmp_path / "t.safetensors", kind="lora", format="loratools")
    made = only(tmp_path / "t.safetensors")
    assert isinstance(made, LowRank) and made.layer == "transposed" and made.shape() == (15, 20) and turned["applied"] == 1


def test_a_convolution_keeps_its_kernel(tmp_path: Path) -> None:
    W = weight("conv")
    delta = loha(8, 12, 2, 0)
    convert(in_memory(delta), tmp_path / "out", kind="lora", base=base_of(tmp_path, W))
    found = only(tmp_path / "out")
    assert isinstance(found, LowRank) and found.A.spec.shape == (4, 3, 2, 2) and found.layer == "conv"
    expected = W.double() + loha_algebra(delta).reshape(W.shape)
    assert torch.allclose(applied(found, W), expected, rtol=0, atol=1e-6 * float(expected.norm()))


def test_without_a_base_the_kernel_is_that_of_a_factor_which_has_it(tmp_path: Path) -> None:
    """LoKr's whole w2 and the cores of LoKr and LoHa have a kernel; matrices alone have none, and are said to be taken for linear."""
    core, one = (2, 2, 3, 2), to_ref(randn(2, 1, seed=9))
    given: dict[str, Additive] = {
        "whole": LoKr(w1=one, w2=to_ref(randn(4, 3, 3, 2, seed=3)), scale=1.0),
        "core": LoKr(w1=one, **drawn_refs(w2_a=(2, 4), w2_b=(2, 3), t2=core), scale=0.5, alpha=1.0),
        "loha": LoHa(**drawn_refs(w1_a=(2, 8), w1_b=(2, 3), w2_a=(2, 8), w2_b=(2, 3), t1=core, t2=core), scale=1.0),
    }
    W = torch.zeros(8, 3, 3, 2)
    receipt = convert(Adapter({f"{name}.weight": delta for name, delta in given.items()}), tmp_path / "out", kind="lora")
    found = load(tmp_path / "out")
    assert not receipt["notes"]
    for name, delta in given.items():
        made = found[f"{name}.weight"]
        assert isinstance(made, LowRank) and made.A.spec.shape[1:] == (3, 3, 2)
        expected = applied(delta, W)
        assert torch.allclose(applied(made, W), expected, rtol=0, atol=1e-6 * float(expected.norm()))


def drawn_refs(**shapes: tuple[int, ...]) -> dict[str, Ref]:
    return {name: to_ref(randn(*shape, seed=seed)) for seed, (name, shape) in enumerate(shapes.items())}


def test_an_embeddings_change_is_an_embeddings(tmp_path: Path) -> None:
    """Told by its name, or the user, however its delta came to lie; peft has other keys for it."""
    for name, options in (("wte.weight", {}), ("m.weight", {"embedding": ["m"]})):
        base = base_of(tmp_path / name, torch.zeros(15, 20), name)
        given = in_memory(TurnedAdditive(delta=loha(20, 15, 2, 0)), name)
        convert(given, tmp_path / name / "out", kind="lora", base=base, **options)  # type: ignore[arg-type]
        found = load(tmp_path / name / "out")[name]
        assert isinstance(found, LowRank) and found.layer == "embedding"
        expected = loha_algebra(loha(20, 15, 2, 0)).T
        assert torch.allclose(applied(found, torch.zeros(15, 20)), expected, rtol=0, atol=1e-6 * float(expected.norm()))


def test_a_difference_without_a_product_is_truncated(tmp_path: Path) -> None:
    diff = randn(12, 9, seed=0)
    given = in_memory(Full(diff=to_ref(diff), scale=0.5))
    (row,) = convert(given, tmp_path / "out", kind="lora", rank=4)["tensors"]
    assert row["error"] == pytest.approx(tail(0.5 * diff.double(), 4) / float(0.5 * diff.double().norm()), rel=1e-6)
    with pytest.raises(OptionError, match=r"m\.weight: a whole-tensor delta is of no small rank, so it is approximated"):
        convert(given, tmp_path / "no", kind="lora")


def test_what_only_w_tells_of(tmp_path: Path) -> None:
    """(IA)³ scales rows: a change of full rank, and of the bias what it adds to it."""
    W, b = weight("linear"), randn(14, seed=8)
    scaled = Scaled(l=to_ref(1 + randn(14, seed=4)))
    given = Adapter({"m.weight": scaled, "m.bias": WherePresent(delta=scaled)})
    base = base_of(tmp_path, W, **{"m.bias": b})
    receipt = checked(convert(given, tmp_path / "out", kind="lora", base=base, rank=9), tmp_path / "out")
    assert rows_of(receipt)["m.weight"]["error"] < 1e-6 and receipt["applied"] == receipt["expected"] == 2
    found = load(tmp_path / "out")
    l = (1 + randn(14, seed=4)).double()  # noqa: E741
    assert torch.allclose(applied(found["m.weight"], W), W.double() * l.unsqueeze(1), rtol=0, atol=1e-6 * float(W.norm()))
    assert torch.allclose(applied(found["m.bias"], b), b.double() * l, rtol=1e-6)
    with pytest.raises(UnsupportedError, match=r"m\.weight: an \(IA\)³ delta: what it does to a weight depends on that weight; give --b"):
        convert(Adapter({"m.weight": given["m.weight"]}), tmp_path / "no", kind="lora", rank=2)


def test_lora_stays_unless_a_rank_or_dtype_is_asked_for(tmp_path: Path) -> None:
    part = Part(delta=low((2, 4), 2, 0), start=0, stop=2)
    given = Adapter({"m.weight": low((14, 9), 4, 0), "n.weight": low((14, 9), 2, 1), "p.weight": part})
    assert convert(given, tmp_path / "same.safetensors", kind="lora", format="loratools")["tensors"] == []
    found = load(tmp_path / "same.safetensors")
    assert all(bytes(ref.read()) == bytes(given[name].refs()[field].read()) for name in given for field, ref in found[name].refs().items())
    rows = rows_of(convert(given, tmp_path / "small.safetensors", kind="lora", rank=3, format="loratools"))
    assert set(rows) == {"m.weight"} and rows["m.weight"]["rank"] == 3
    rows = rows_of(convert(given, tmp_path / "half.safetensors", kind="lora", dtype="float16", format="loratools"))
    assert {row["rank"] for row in rows.values()} == {4, 2} and all(1e-5 < row["error"] < 1e-3 for row in rows.values())
    rows = rows_of(convert(given, tmp_path / "near.safetensors", kind="lora", max_error=0.9, format="loratools"))
    assert rows["m.weight"]["rank"] < 4


# -- the other axis


def refitted(folder: Path, delta: DoRA, W: Tensor, axis: str, **options: Any) -> tuple[DoRA, dict[str, Any]]:
    out = folder / "refitted.safetensors"
    options |= {"base": base_of(folder, W), "format": "loratools", "overwrite": True}
    receipt = checked(convert(in_memory(delta), out, magnitude_axis=axis, **options), out)
    found = only(out)
    assert isinstance(found, DoRA)
    return found, receipt["tensors"][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("word", [word for word in LAYERS if word != "conv"])
def test_full_rank_and_dense_directions_carry_the_same_weight(tmp_path: Path, word: str, dtype: torch.dtype) -> None:
    """There and back: W′ stays to the rounding of magnitudes and factors."""
    W = weight(word, 3, dtype)
    rank = min(LAYERS[word])
    dora = dora_of(low(LAYERS[word], rank, 0, layer=layer_of(word)), W, word)
    target = dora_algebra(dora, W)
    there, row = refitted(tmp_path, dora, W, "in")
    assert there.axis != dora.axis and row["optimal_error"] == 0 and row["rank"] == rank and "plain_error" not in row
    # a float32 magnitude is off by 2⁻²⁴ of W′, float32 factors by 1e-7 of W′ − W
    assert float((applied(there, W) - target).norm()) < 2e-7 * float(target.norm() + W.double().norm())
    back, _ = refitted(tmp_path, there, W, "out")
    assert back.axis == dora.axis and float((applied(back, W) - target).norm()) < 5e-7 * float(target.norm() + W.double().norm())
    whole = DoRA(direction=Full(diff=to_ref((applied(dora.direction, W) - W.double()).reshape(W.shape))), magnitude=dora.magnitude)
    dense, row = refitted(tmp_path, whole, W, "in", transposed=["m"] if word in AXIS else ()) if word != "embedding" else (None, {})
    if dense is not None:
        assert isinstance(dense.direction, Full) and row["rank"] is None and row["error"] < 1e-5
        assert float((applied(dense, W) - target).norm()) < 1e-7 * float(target.norm())


@settings(max_examples=15)
@given(st.sampled_from([word for word in LAYERS if word != "conv"]), st.integers(1, 5), st.integers(0, 99), st.sampled_from([1e-3, 0.05]))
def test_a_low_rank_direction_is_refitted(tmp_path_factory: pytest.TempPathFactory, word: str, rank: int, seed: int, drift: float) -> None:
    folder, W = tmp_path_factory.mktemp("a"), weight(word, seed)
    lora = low(LAYERS[word], rank, seed, layer=layer_of(word))
    scaled = replace(lora, alpha=lora.alpha * 0.1 * float(W.norm()) / lora.norm())
    dora = dora_of(scaled, W, word, drift)
    found, row = refitted(folder, dora, W, "in")
    target = dora_algebra(dora, W)
    D = target - W.double()
    error, norm = float((applied(found, W) - target).norm()), float(D.norm())
    assert isinstance(found.direction, LowRank) and found.direction.rank == rank == row["rank"] and row["optimal_error"] is None
    assert row["error"] == pytest.approx(error / norm, rel=1e-6)
    assert row["plain_error"] == pytest.approx(tail(D, rank) / norm, rel=1e-4)
    floor = 1e-6 * float(W.double().norm())  # float32 magnitudes
    assert error <= tail(D, rank) * 1.0001 + floor  # magnitudes never make it worse than factors alone


@pytest.mark.parametrize(("drift", "share"), [(0.01, 0.01), (0.001, 0.01), (0.05, 0.02)])
def test_one_step_is_near_where_alternating_ends(tmp_path: Path, drift: float, share: float) -> None:
    """On a weight of some size; on one of a dozen rows its magnitudes are so many of its numbers that more steps gain a fifth."""
    W = randn(160, 96, seed=0) * (1 + randn(160, 1, seed=1).abs()) * (1 + randn(1, 96, seed=2).abs())
    lora = low((160, 96), 8, 0, layer="linear")
    dora = dora_of(replace(lora, alpha=lora.alpha * share * float(W.norm()) / lora.norm()), W, "linear", drift)
    found, row = refitted(tmp_path, dora, W, "in")
    target = dora_algebra(dora, W)
    error = float((applied(found, W) - target).norm())
    assert error < row["plain_error"] * float((target - W.double()).norm())
    assert error < 1.01 * alternated(target, W.double(), 8, 0)


def alternated(target: Tensor, W: Tensor, rank: int, side: int) -> float:
    """Where alternating between factors and magnitudes ends: the nearest c∘W + L that is found in 30 rounds."""
    c, error = torch.ones(1, dtype=torch.float64), math.inf
    for _ in range(30):
        U, S, Vh = torch.linalg.svd(target - c * W, full_matrices=False)
        L = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        error = float((target - c * W - L).norm())
        c = ((target - L) * W).sum(side, keepdim=True) / (W * W).sum(side, keepdim=True)
    return error


def test_another_rank_may_be_given(tmp_path: Path) -> None:
    W = weight("linear")
    dora = dora_of(low(LAYERS["linear"], 2, 0, layer="linear"), W, "linear")
    errors = [refitted(tmp_path, dora, W, "in", rank=rank)[1]["error"] for rank in (1, 2, 5, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6
    found, row = refitted(tmp_path, dora, W, "in", max_error=0.2)
    assert row["error"] < 0.2 and found.direction.facts()["rank"] == row["rank"]
    direction = DoRA(direction=loha(14, 9, 2, 0), magnitude=dora.magnitude)
    found, row = refitted(tmp_path, direction, W, "in", rank=9)
    assert isinstance(found.direction, LowRank) and row["error"] < 1e-6


def test_the_axis_it_has_already_is_kept(tmp_path: Path) -> None:
    W = weight("linear")
    dora = dora_of(low(LAYERS["linear"], 2, 0, layer="linear"), W, "linear")
    receipt = convert(in_memory(dora), tmp_path / "out", magnitude_axis="out", base=base_of(tmp_path, W))
    assert receipt["tensors"] == [] and bytes(only(tmp_path / "out").refs()["magnitude"].read()) == bytes(dora.magnitude.read())


def test_the_tutorials_dora_as_pefts(tmp_path: Path) -> None:
    """One magnitude an input to one an output, in a format that has the other: the use this is for."""
    W = weight("square")
    given = dora_of(low(LAYERS["square"], 11, 0, layer="linear", alpha=22.0), W, "square", axis=0)
    save(in_memory(given), tmp_path / "tutorial.safetensors", format="scratch")
    base = base_of(tmp_path, W)
    convert(tmp_path / "tutorial.safetensors", tmp_path / "peft", magnitude_axis="out", base=base, format="peft", scratch_dora="merged")
    found = load(tmp_path / "peft").resolve({"m.weight": to_ref(W).spec})["m.weight"]
    target = dora_algebra(given, W)
    assert float((applied(found, W) - target).norm()) < 5e-7 * float(target.norm() + W.double().norm())


# -- bare vectors, and magnitudes that fit another axis


def test_a_bare_vector_is_of_the_axis_whose_norms_it_fits(tmp_path: Path) -> None:
    size = 48
    W = randn(size, size, seed=0) * (1 + randn(size, 1, seed=1).abs()) * (1 + randn(1, size, seed=2).abs())
    lora = low((size, size), 2, 0, layer="linear", alpha=0.1)
    for axis in (1, 0):
        dora = dora_of(lora, W, "linear", 0.02, axis=axis)
        flat = in_memory(FlatDoRA(direction=lora, magnitude=dora.magnitude.reshape(size)))
        base = base_of(tmp_path, W)
        convert(flat, tmp_path / f"{axis}.safetensors", kind="dense", base=base)
        found = applied(only(tmp_path / f"{axis}.safetensors"), W)
        assert torch.allclose(found, dora_algebra(dora, W), rtol=1e-12)
        convert(flat, tmp_path / f"settled{axis}.safetensors", kind="dora", base=base, format="loratools")
        settled = only(tmp_path / f"settled{axis}.safetensors")
        assert isinstance(settled, DoRA) and settled.axis == ("out" if axis else "in")
        convert(flat, tmp_path / f"out{axis}.safetensors", kind="dora", magnitude_axis="out", base=base, rank=size, format="loratools")
        assert torch.allclose(applied(only(tmp_path / f"out{axis}.safetensors"), W), dora_algebra(dora, W), atol=1e-4)


@pytest.mark.parametrize("options", [{"kind": "lora", "rank": 1}, {"kind": "dora"}, {"kind": "dense"}, {"magnitude_axis": "in"}])
def test_a_bare_vector_that_fits_both_ways_is_an_error_with_both_numbers(tmp_path: Path, options: dict[str, Any]) -> None:
    W = randn(64, 64, seed=0)
    m = W.norm(dim=1) * (1 + 0.3 * randn(64, seed=1))
    given = in_memory(FlatDoRA(direction=low((64, 64), 1, 0, layer="linear", alpha=0.1), magnitude=to_ref(m)))
    text = r"m\.weight: 64 DoRA magnitudes without an axis.*one for each \w+, off .*; or one for each \w+, off"
    with pytest.raises(AmbiguousError, match=text):
        convert(given, tmp_path / "out.safetensors", base=base_of(tmp_path, W), format="loratools", **options)
    assert not (tmp_path / "out.safetensors").exists()


def test_magnitudes_that_fit_the_other_axis_are_told(tmp_path: Path) -> None:
    size = 48
    W = randn(size, size, seed=0) * (1 + randn(size, 1, seed=1).abs()) * (1 + randn(1, size, seed=2).abs())
    dora = dora_of(low((size, size), 2, 0, layer="linear", alpha=0.1), W, "linear", 0.02, axis=0)
    wrong = DoRA(direction=dora.direction, magnitude=dora.magnitude.T)
    base = base_of(tmp_path, W)
    ways: list[dict[str, Any]] = [{"kind": "lora", "rank": 2}, {"kind": "dense"}, {"magnitude_axis": "in"}]
    for number, options in enumerate(ways):
        (note,) = convert(in_memory(wrong), tmp_path / f"{number}.safetensors", base=base, format="loratools", **options)["notes"]
        assert note.startswith("m.weight: its magnitudes are read as one for each row, off ‖W‖ by ")
        assert "read as one for each column they are off by 0.02" in note
    assert convert(in_memory(dora), tmp_path / "good", kind="lora", rank=2, base=base)["notes"] == []


# -- what comes along, and what is refused


def test_biases_and_saved_tensors_come_along(tmp_path: Path) -> None:
    lora = low((14, 9), 2, 0, layer="linear")
    bias, head = Full(diff=to_ref(randn(14, seed=1)), scale=0.5), Replacement(value=to_ref(randn(3, 3, seed=2)))
    given = Adapter({"m.weight": loha(14, 9, 2, 0), "m.bias": bias, "head.weight": head})
    convert(given, tmp_path / "out", kind="lora")
    found = load(tmp_path / "out")
    assert torch.allclose(applied(found["m.bias"], torch.zeros(14)), 0.5 * randn(14, seed=1).double(), rtol=1e-6)
    assert bytes(found["head.weight"].refs()["value"].read()) == raw(randn(3, 3, seed=2))
    base = base_of(tmp_path, weight("linear"), **{"m.bias": randn(14, seed=3)})
    both = Adapter({"m.weight": lora, "m.bias": Full(diff=to_ref(randn(14, seed=1)), scale=lora.scaling)})
    convert(both, tmp_path / "dora.safetensors", kind="dora", base=base, format="loratools")
    assert bytes(load(tmp_path / "dora.safetensors")["m.bias"].refs()["diff"].read()) == raw(randn(14, seed=1))


def test_the_config_of_another_method_does_not_come_along(tmp_path: Path) -> None:
    tensors = {f"base_model.model.m.hada_{name}": read_tensor(ref) for name, ref in loha(14, 9, 2, 0).refs().items()}
    config = {"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": ["m"], "base_model_name_or_path": "x/y", "init_weights": True}
    path = write_adapter(tmp_path / "loha", tensors, config)
    receipt = checked(convert(path, tmp_path / "out", kind="lora"), tmp_path / "out")
    found = load(tmp_path / "out")
    assert found.metadata["peft"]["base_model_name_or_path"] == "x/y" and receipt["tensors"][0]["kind_before"] == "loha"
    assert [Path(entry["path"]).name for entry in receipt["inputs"]] == ["adapter_model.safetensors", "adapter_config.json"]


def two_doras() -> Adapter:
    W = weight("linear")
    dora = dora_of(low(LAYERS["linear"], 2, 0, layer="linear"), W, "linear")
    return Adapter({"a.weight": dora, "b.weight": dora}, path=Path("given"))


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_magnitudes_are_never_dropped(tmp_path: Path, kind: str) -> None:
    """Without its base a DoRA becomes nothing else; every one of them is named."""
    with pytest.raises(LoratoolsError) as raised:
        convert(two_doras(), tmp_path / "out.safetensors", kind=kind, **({"rank": 2} if kind == "lora" else {}))
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["a.weight", "b.weight"]
    assert all("a DoRA delta: " in line and line.endswith("give --base") for line in lines)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"kind": "qlora"}, OptionError, "--kind: found qlora, expected lora or dora or dense"),
        ({"magnitude_axis": "rows"}, OptionError, "--magnitude-axis: found rows, expected in or out"),
        ({"kind": "lora", "rank": 0}, OptionError, "--rank: found 0, expected a whole number of at least 1"),
        ({"kind": "lora", "energy": 0}, OptionError, "--energy: found 0"),
        ({"kind": "lora", "max_error": 1}, OptionError, "--max-error: found 1"),
        ({"kind": "lora", "rank": 1, "energy": 0.5}, OptionError, "at most one way to choose ranks: found --rank and --energy"),
        ({"rank": 1}, OptionError, "--rank is for what is approximated: found no --kind, expected --kind lora or --magnitude-axis"),
        ({"kind": "dense", "max_error": 0.1}, OptionError, "--max-error is for what is approximated: found --kind dense"),
        ({"dtype": "float16"}, OptionError, "--dtype is for what is computed anew; all else keeps its bytes: found no --kind"),
        ({"kind": "dora", "dtype": "float16"}, OptionError, "keeps its bytes: found --kind dora, expected --kind dense, --kind lora"),
        ({"kind": "lora", "magnitude_axis": "in"}, OptionError, "--kind lora leaves no magnitudes: found --magnitude-axis in"),
        ({"kind": "lora", "dtype": "int8"}, OptionError, "unknown --dtype"),
        ({"format": "kohyaa"}, OptionError, "unknown --format: found kohyaa"),
        ({"device": "tpu"}, OptionError, "--device: found tpu"),
        ({"threads": 0}, OptionError, "--threads: found 0, expected at least 1"),
        ({"rename": ["a=b"]}, OptionError, "--rename maps names to a base's: found no --base"),
        ({"kind": "dora"}, UnsupportedError, "m.weight: a LoRA delta: the magnitudes of a DoRA are the norms of W + ΔW; give --base"),
        ({"kind": "dense"}, UnsupportedError, "a LoRA delta: a dense difference has the shape, and the orientation, of the weight; give"),
        ({"magnitude_axis": "in"}, MatchError, "--magnitude-axis, and no DoRA in it: found lora; --kind dora makes one, along this axis"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        convert(in_memory(low((14, 9), 2, 0)), tmp_path / "out", **options)
    assert text in str(raised.value) and not (tmp_path / "out").exists()


def test_what_a_delta_cannot_become(tmp_path: Path) -> None:
    W = {"a.weight": randn(6, 4, seed=0), "e.weight": randn(2, 3, 4, seed=3), "c.weight": weight("conv"), "bare": randn(6, 4, seed=1)}
    base = write_checkpoint(tmp_path / "base", W, {"num_experts": 2})
    scaled, stack, bare_one = Scaled(l=to_ref(torch.ones(6))), Full(diff=to_ref(torch.ones(2, 3, 4))), Full(diff=to_ref(torch.ones(6, 4)))
    conv = low((8, 3, 2, 2), 1, 0, layer="conv")
    cases: list[tuple[str, Delta, dict[str, Any], type[Exception], str]] = [
        ("a.weight", scaled, {"kind": "dora"}, UnsupportedError, "an (IA)³ change is no difference that could be a DoRA's direction"),
        ("e.weight", stack, {"kind": "lora", "rank": 1}, NotExpressible, "a whole-tensor delta has no low-rank form: a stack of matrices"),
        ("bare", bare_one, {"kind": "lora", "rank": 1}, NotExpressible, "a whole-tensor delta has no low-rank form: a bare parameter"),
        ("c.weight", conv, {"kind": "dora", "magnitude_axis": "in"}, NotExpressible, "a magnitude for each input channel"),
    ]
    for name, delta, options, error, text in cases:
        with pytest.raises(error) as raised:
            convert(in_memory(delta, name), tmp_path / "out", base=base, **options)
        assert text in str(raised.value) and str(raised.value).startswith(name)
    direction = DoRA(direction=loha(6, 4, 1, 0), magnitude=to_ref(torch.ones(6, 1)))
    bare = DoRA(direction=_Bare(**loha(6, 4, 1, 0).refs(), scale=1.0), magnitude=to_ref(torch.ones(6, 1)))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a LoHa direction, which the other axis changes, has no rank of its own"):
        convert(in_memory(bare, "a.weight"), tmp_path / "out", base=base, magnitude_axis="in")
    with pytest.raises(NotExpressible, match="in_proj_weight: peft has no DoRA of what is no layer's weight; write --format loratools"):
        convert(in_memory(replace(direction, direction=low((6, 4), 1, 0)), "in_proj_weight"), tmp_path / "out", format="peft")
    with pytest.raises(NotExpressible, match="peft's LoRA cannot say a DoRA of a LoHa direction; convert --kind lora makes"):
        convert(in_memory(direction, "a.weight"), tmp_path / "out", format="peft")


class _Bare(LoHa):
    """A difference that tells nothing of a rank."""

    def facts(self) -> dict[str, Any]:
        return {}


def test_dense_is_not_written_where_it_cannot_be_said(tmp_path: Path) -> None:
    W = weight("linear")
    given, base = in_memory(low((14, 9), 1, 0, layer="linear")), base_of(tmp_path, W)
    with pytest.raises(NotExpressible, match="peft's LoRA cannot say a whole-tensor delta"):
        convert(given, tmp_path / "out", kind="dense", base=base, format="peft")
    convert(given, tmp_path / "folder", kind="dense", base=base)
    assert load(tmp_path / "folder").format == "loratools"


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"m.weight": weight("linear")}, {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(QuantizedError, match="gptq"):
        convert(in_memory(low((14, 9), 1, 0)), tmp_path / "out", kind="dora", base=base)


def test_inf_and_nan_are_named(tmp_path: Path) -> None:
    W = weight("linear")
    W[3, 3] = math.inf
    base = base_of(tmp_path, W)
    dora = dora_of(low(LAYERS["linear"], 2, 0, layer="linear"), weight("linear"), "linear")
    for kind in ("lora", "dense"):
        with pytest.raises(NonFiniteError, match=r"m\.weight: W' is not finite"):
            convert(in_memory(dora), tmp_path / "out.safetensors", kind=kind, base=base, rank=1 if kind == "lora" else None)
    with pytest.raises(NonFiniteError, match=r"m\.weight: W \+ ΔW holds inf or nan"):
        convert(in_memory(dora.direction), tmp_path / "out.safetensors", kind="dora", base=base)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_tied_head_has_its_embeddings_weight(tmp_path: Path) -> None:
    W = randn(17, 8, seed=0)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = write_checkpoint(tmp_path / "base", {"model.embed_tokens.weight": W}, config)
    lora = low((17, 8), 2, 0, layer="linear")
    convert(in_memory(lora, "lm_head.weight"), tmp_path / "out", kind="dora", base=base)
    found = load(tmp_path / "out")["lm_head.weight"]
    V = applied(lora, W)
    assert isinstance(found, DoRA) and float((applied(found, W) - V).norm()) <= U32 * float(V.norm())


def test_a_convolutions_dora_along_its_inputs(tmp_path: Path) -> None:
    """LyCORIS' (1, in, 1, 1): a magnitude for each input channel, whose part in the change is stated too."""
    W = weight("conv")
    lora = low(LAYERS["conv"], 2, 0, layer="conv")
    V = applied(lora, W)
    norm = V.transpose(0, 1).flatten(1).norm(dim=1)
    m = norm * (1 + 0.05 * randn(3, seed=1).double())
    dora = DoRA(direction=lora, magnitude=to_ref(m.reshape(1, 3, 1, 1)))
    (row,) = convert(in_memory(dora), tmp_path / "out", kind="lora", base=base_of(tmp_path, W), rank=8)["tensors"]
    g = (m / norm).reshape(1, 3, 1, 1)
    assert torch.allclose(applied(only(tmp_path / "out"), W), g * V, rtol=0, atol=1e-6 * float(V.norm()))
    change, scaling = float((g * V - W).norm()), float(((g - 1) * W).norm())
    assert row["row_scaling"] * change == pytest.approx(scaling, rel=1e-9)
    told = inspect(dora_file(tmp_path, dora), base=tmp_path / "base")["modules"][0]["magnitudes"]
    before = W.double().transpose(0, 1).flatten(1).norm(dim=1)
    assert told["axis"] == "in" and told["drift"]["max"] == pytest.approx(float((m / before).max() - 1))


def dora_file(folder: Path, dora: DoRA) -> Path:
    save(in_memory(dora), folder / "dora.safetensors", format="loratools")
    return folder / "dora.safetensors"


def test_the_same_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    tensors = {f"{i}.weight": weight("linear", i) for i in range(5)}
    base = write_checkpoint(tmp_path / "base", tensors)
    given = Adapter({name: dora_of(low((14, 9), 2, i, layer="linear"), W, "linear") for i, (name, W) in enumerate(tensors.items())})
    for options in ({"kind": "lora", "rank": 3}, {"magnitude_axis": "in"}):
        for count in (1, 3):
            convert(given, tmp_path / f"{count}.safetensors", base=base, threads=count, format="loratools", overwrite=True, **options)  # type: ignore[arg-type]
        assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_a_dora_file_in_the_wild_shape(tmp_path: Path) -> None:
    """Through peft's own file: names, flat magnitudes and all."""
    W = weight("linear")
    dora = dora_of(low(LAYERS["linear"], 2, 0, alpha=4.0), W, "linear")
    tensors = {f"base_model.model.m.lora_{name}.weight": read_tensor(dora.refs()[name]) for name in "AB"}
    tensors["base_model.model.m.lora_magnitude_vector"] = read_tensor(dora.magnitude).reshape(-1)
    path = write_adapter(tmp_path / "dora", tensors, peft_config(target_modules=["m"], use_dora=True))
    receipt = checked(convert(path, tmp_path / "out", kind="lora", base=base_of(tmp_path, W), rank=9), tmp_path / "out")
    assert receipt["tensors"][0]["error"] < 1e-6 and receipt["tensors"][0]["row_scaling"] > 0.1
    assert [row["role"] for row in receipt["inputs"]] == ["adapter", "adapter", "base"]
    found = load(tmp_path / "out").resolve({"m.weight": to_ref(W).spec})["m.weight"]
    assert torch.allclose(applied(found, W), dora_algebra(dora, W), rtol=0, atol=1e-6 * float(W.norm()))
