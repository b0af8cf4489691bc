"""extract: laws (the extraction of a merge is its adapter), quality against float64 SVD, what is saved, dropped, refused, and budgets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratools.errors import Faults, LoratoolsError, MatchError, NonFiniteError, OptionError, OutputError, QuantizedError, UnsupportedError
from loratools.formats import load
from loratools.ops.extract import extract
from loratools.ops.merge import merge
from tests.files import llama_config, llama_tensors, peft_config, raw, read_adapter, read_checkpoint, write_adapter, write_checkpoint

Tensors = Mapping[str, Tensor]
ROOT = "base_model.model."


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tuned_of(base: Tensors, scale: float = 0.1) -> dict[str, Tensor]:
    """Every tensor moved, in its own dtype."""
    return {name: (W.float() + scale * noise(tuple(W.shape), index)).to(W.dtype) for index, (name, W) in enumerate(base.items(), 1)}


def written_pair(folder: Path, base: Tensors, tuned: Tensors, config: Mapping[str, Any] | None = None) -> tuple[Path, Path]:
    return write_checkpoint(folder / "base", base, config), write_checkpoint(folder / "tuned", tuned, config)


def only(receipt: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The receipt's one row of a tensor."""
    (row,) = [row for row in receipt["tensors"] if row["name"] == name]
    return dict(row)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny Llama and a fine-tune of it that moved every tensor."""
    base = llama_tensors(hidden=16)
    return written_pair(tmp_path, base, tuned_of(base), llama_config())


def test_a_format_without_a_config_is_extracted_into_one_file(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    receipt = extract(*pair, tmp_path / "out.safetensors", rank=2, format="comfyui", include=["*_proj*"], rest="drop", sha256=True)
    assert [row["path"] for row in receipt["outputs"]] == ["out.safetensors"] and "sha256" in receipt["outputs"][0]
    assert (tmp_path / "out.safetensors.loratools.json").is_file() and load(tmp_path / "out.safetensors").format == "comfyui"


# -- laws


@settings(max_examples=10)
@given(
    rank=st.integers(1, 4),
    alpha=st.sampled_from([0.5, 4, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_the_extraction_of_a_merge_is_its_adapter(
    tmp_path_factory: pytest.TempPathFactory, rank: int, alpha: float, dtype: torch.dtype, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("law")
    weights = {f"layers.{index}.proj.weight": noise((24, 16 + index), seed + index).to(dtype) for index in range(2)}
    base = write_checkpoint(folder / "base", weights)
    factors = {}
    for index in range(2):
        factors[f"{ROOT}layers.{index}.proj.lora_A.weight"] = noise((rank, 16 + index), seed + 10 + index)
        factors[f"{ROOT}layers.{index}.proj.lora_B.weight"] = noise((24, rank), seed + 20 + index)
    adapter = write_adapter(folder / "adapter", factors, peft_config(r=rank, lora_alpha=alpha, target_modules=["proj"]))
    merge(base, adapter, folder / "merged")
    extract(base, folder / "merged", folder / "found", rank=rank)
    known, found = load(adapter), load(folder / "found")
    assert set(found) == set(known) == set(weights)
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype]
    for name, W in weights.items():
        one, other = dense(known[name]), dense(found[name])
        # the merge rounds each W + ΔW to half a unit in its last place; the best rank-r fit is at most twice as far
        assert float((one - other).norm()) <= 2 * unit * float((W.double() + one).norm()) + 2e-7 * float(one.norm())


def dense(delta: Any) -> Tensor:
    B, A = delta.factors()
    return torch.as_tensor(delta.scaling * B @ A)


@pytest.mark.parametrize("options", [{"rank": 3}, {"energy": 0.7}, {"size": 9000}, {"max_error": 0.5, "dtype": "bf16"}])
def test_the_same_bytes_for_any_number_of_threads(pair: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    written = []
    for count in (1, 2, 3):
        extract(*pair, tmp_path / f"out{count}", threads=count, seed=5, **options)
        written.append([(tmp_path / f"out{count}" / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")])
    assert written[0] == written[1] == written[2]


# -- quality


def spectrum(kind: str, size: int) -> Tensor:
    k = torch.arange(size, dtype=torch.float64)
    return {
        "flat": 1 / (1 + 0.001 * k),
        "steep": 0.5**k,
        "low": (k < 8).double(),
        "repeated": torch.where(k < 3, 1.0, torch.where(k < 20, 0.5, 0.1)),
        "power": (k + 1) ** -0.7,
    }[kind]


def with_spectrum(sigma: Tensor, rows: int, columns: int) -> Tensor:
    U, V = (torch.linalg.qr(noise((n, len(sigma)), n).double()).Q for n in (rows, columns))
    return (U * sigma) @ V.T


SHAPES = {"small.weight": (96, 64), "wide.weight": (60, 200), "large.weight": (840, 900)}  # the last takes the iterative route


@pytest.fixture(scope="module", params=["flat", "steep", "low", "repeated", "power"])
def hard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Tensor]]:
    """A float32 pair whose differences have a made spectrum, and the true differences' singular values."""
    base = {name: noise(shape, 1) for name, shape in SHAPES.items()}
    change = {name: with_spectrum(spectrum(request.param, min(shape)), *shape) for name, shape in SHAPES.items()}
    tuned = {name: (W.double() + 0.3 * change[name]).float() for name, W in base.items()}
    sigma = {name: torch.linalg.svdvals(tuned[name].double() - W.double()) for name, W in base.items()}
    return *written_pair(tmp_path_factory.mktemp(request.param), base, tuned), sigma


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_errors_meet_the_float64_svd_and_bounds_never_exceed_it(
    hard: tuple[Path, Path, dict[str, Tensor]], rank: int, tmp_path: Path
) -> None:
    base, tuned, sigma = hard
    receipt = extract(base, tuned, tmp_path / "out", rank=rank, rest="drop")
    before, after, found = read_checkpoint(base), read_checkpoint(tuned), load(tmp_path / "out")
    for name in SHAPES:
        exact = after[name].double() - before[name].double()
        norm, optimum = float(exact.norm()), float(sigma[name][rank:].norm())
        error = float((exact - dense(found[name])).norm())
        assert error <= 1.0001 * optimum + 2e-7 * norm
        row = only(receipt, name)
        assert row["rank"] == rank
        # measured on D, which is Δ but for 2⁻²⁴ of it, partly in float32
        assert row["error"] == pytest.approx(error / norm, rel=1e-5, abs=1e-7)
        assert row["optimal_error"] * norm <= optimum * (1 + 1e-12)
        assert row["optimal_error"] <= row["error"] * (1 + 1e-12)
        # a certificate says something: within 1e-4 and what float32 and the Gram route cannot see
        assert row["error"] <= 1.00011 * row["optimal_error"] + 3e-6


def test_exact_is_lapack_in_float64(hard: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path) -> None:
    base, tuned, sigma = hard
    receipt = extract(base, tuned, tmp_path / "out", rank=8, exact=True, include=["small", "wide"])
    for name in ("small.weight", "wide.weight"):
        norm, optimum = float(sigma[name].norm()), float(sigma[name][8:].norm())
        row = only(receipt, name)
        # rounding the factors to float32 adds √2·2⁻²⁴·‖D₈‖
        assert row["error"] <= max((optimum / norm) ** 2 + (2e-7) ** 2, 0) ** 0.5 + 1e-12
        assert optimum / norm - 1e-11 <= row["optimal_error"] + 1e-11 <= optimum / norm + 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_exactly_low_rank_change_is_found_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    # small whole numbers: sums and differences are exact in every dtype, and no sum is 0, where the factors' 1e-7 would stay
    base = torch.randint(8, 64, (64, 48), generator=torch.Generator().manual_seed(0)).to(dtype)
    B, A = (torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(1)) for shape in ((64, 2), (2, 48)))
    paths = written_pair(tmp_path, {"q.weight": base}, {"q.weight": base + (B @ A).to(dtype)})
    receipt = extract(*paths, tmp_path / "out", rank=2, rest="drop")
    assert only(receipt, "q.weight")["error"] < 2e-7  # float32 factors
    assert only(receipt, "q.weight")["energy"] == pytest.approx(1)
    merge(paths[0], tmp_path / "out", tmp_path / "merged")
    merged = read_checkpoint(tmp_path / "merged")["q.weight"]
    if dtype in (torch.bfloat16, torch.float16):  # where the factors are finer than the weight, rounding gives back its very bytes
        assert raw(merged) == raw(base + (B @ A).to(dtype))


@pytest.mark.parametrize(
    ("options", "limit"), [({"max_error": 0.5}, 0.5), ({"energy": 0.9}, 0.1**0.5), ({"max_error": 0.2, "dtype": "bf16"}, 0.2)]
)
def test_ranks_by_error_and_by_energy(
    hard: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path, options: dict[str, Any], limit: float
) -> None:
    base, tuned, sigma = hard
    receipt = extract(base, tuned, tmp_path / "out", rest="drop", **options)
    for name in SHAPES:
        row, values = only(receipt, name), sigma[name].square()
        assert row["error"] <= limit * (1 + 1e-6)
        assert row["energy"] >= 1 - limit**2 - 1e-6
        tail = (values.flip(0).cumsum(0).flip(0) / values.sum()).sqrt()  # the error of rank k, at k
        if row["rank"] > 1:
            assert tail[row["rank"] - 1] > limit * 0.999 - 0.004 * ("dtype" in options)


# -- layers of every kind


def test_transposed_weights_and_embeddings_of_gpt2(tmp_path: Path) -> None:
    base = {"h.0.attn.c_attn.weight": noise((8, 24), 1), "h.0.attn.c_proj.weight": noise((8, 8), 2), "wte.weight": noise((40, 8), 3)}
    paths = written_pair(tmp_path, base, tuned_of(base), {"model_type": "gpt2", "tie_word_embeddings": False})
    extract(*paths, tmp_path / "out", rank=3, rest="drop")
    tensors, config = read_adapter(tmp_path / "out")
    assert config["fan_in_fan_out"] is True
    assert {name.removeprefix(ROOT): tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "h.0.attn.c_attn.lora_A.weight": (3, 8), "h.0.attn.c_attn.lora_B.weight": (24, 3),
        "h.0.attn.c_proj.lora_A.weight": (3, 8), "h.0.attn.c_proj.lora_B.weight": (8, 3),
        "wte.lora_embedding_A": (3, 40), "wte.lora_embedding_B": (8, 3),
    }  # fmt: skip
    assert_merges_to_best(paths, tmp_path, rank=3)


@pytest.mark.parametrize("kernel", [(5,), (3, 2), (2, 1, 3), (1, 1)])
def test_convolutions(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    base = {"conv.weight": noise((12, 6, *kernel), 1)}
    paths = written_pair(tmp_path, base, tuned_of(base))
    extract(*paths, tmp_path / "out", rank=3, rest="drop")
    assert read_adapter(tmp_path / "out")[0][f"{ROOT}conv.lora_A.weight"].shape == (3, 6, *kernel)
    assert_merges_to_best(paths, tmp_path, rank=3)


def test_options_name_embeddings_and_transposed_weights(tmp_path: Path) -> None:
    base = {"table.weight": noise((20, 8), 1), "turned.weight": noise((8, 20), 2)}
    paths = written_pair(tmp_path, base, tuned_of(base))
    extract(*paths, tmp_path / "out", rank=2, embedding=["table"], transposed=["turned.weight"])
    tensors, _ = read_adapter(tmp_path / "out")
    assert tensors[f"{ROOT}table.lora_embedding_A"].shape == (2, 20)
    assert tensors[f"{ROOT}turned.lora_A.weight"].shape == (2, 8)


def assert_merges_to_best(paths: tuple[Path, Path], folder: Path, *, rank: int) -> None:
    """The merged weights are as far from the fine-tune's as the best of this rank."""
    merge(paths[0], folder / "out", folder / "merged")
    merged, base, tuned = (read_checkpoint(path) for path in (folder / "merged", *paths))
    for name, W in tuned.items():
        sigma = torch.linalg.svdvals((W.double() - base[name].double()).flatten(1))
        left = float((W.double() - merged[name].double()).norm())
        # the merge rounds each weight once more
        assert left <= 1.0001 * float(sigma[rank:].norm()) + 2e-7 * float(sigma.norm()) + 2**-24 * float(W.norm())


def test_tied_heads_change_with_their_embedding(tmp_path: Path) -> None:
    base = llama_tensors(hidden=16, head=False)
    paths = written_pair(tmp_path, base, tuned_of(base), llama_config(tie_word_embeddings=True))
    receipt = extract(*paths, tmp_path / "out", rank=2)
    assert any("lm_head.weight is tied to model.embed_tokens.weight" in note for note in receipt["notes"])
    assert only(receipt, "lm_head.weight")["error"] == only(receipt, "model.embed_tokens.weight")["error"]
    tensors, _ = read_adapter(tmp_path / "out")
    assert torch.equal(tensors[f"{ROOT}lm_head.lora_A.weight"], tensors[f"{ROOT}model.embed_tokens.lora_embedding_B"].T)
    merged = merge(paths[0], tmp_path / "out", tmp_path / "merged")
    assert merged["applied"] == merged["expected"] == receipt["applied"]
    assert "lm_head.weight" not in read_checkpoint(tmp_path / "merged")


def test_a_head_stored_beside_its_embedding_stays_equal_to_it(tmp_path: Path) -> None:
    base = llama_tensors(hidden=16)
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    tuned = tuned_of(base)
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"].clone()
    paths = written_pair(tmp_path, base, tuned, llama_config(tie_word_embeddings=True))
    extract(*paths, tmp_path / "out", rank=2)
    merge(paths[0], tmp_path / "out", tmp_path / "merged")
    merged = read_checkpoint(tmp_path / "merged")
    assert raw(merged["lm_head.weight"]) == raw(merged["model.embed_tokens.weight"])


# -- the rest


def with_rest(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Tensors of every kind that has no low-rank form, beside one that has."""
    return {
        "block.fc.weight": noise((32, 24), 1).to(dtype), "block.fc.bias": noise((32,), 2).to(dtype),
        "block.norm.weight": noise((32,), 3).to(dtype), "block.norm.bias": noise((32,), 4).to(dtype),
        "bn.weight": noise((6,), 5), "bn.bias": noise((6,), 6), "bn.running_mean": noise((6,), 7), "bn.running_var": noise((6,), 8).abs(),
        "bn.num_batches_tracked": torch.tensor(7), "scale": torch.tensor(0.5), "proj": noise((16, 8), 9),
        "experts.down": noise((3, 8, 8), 10), "depthwise.weight": noise((8, 1, 3, 3), 11), "lone.bias": noise((4,), 12),
    }  # fmt: skip


def moved(base: Tensors) -> dict[str, Tensor]:
    tuned = tuned_of({name: W for name, W in base.items() if W.is_floating_point()})
    return {name: tuned.get(name, W + 5) for name, W in base.items()}


def test_what_has_no_low_rank_form_comes_back_in_its_very_bytes(tmp_path: Path) -> None:
    base = with_rest()
    tuned = moved(base)
    paths = written_pair(tmp_path, base, tuned)
    receipt = extract(*paths, tmp_path / "out", rank=2)
    assert receipt["applied"] == receipt["expected"] == len(base)
    assert receipt["left_out"] == []
    assert only(receipt, "block.fc.weight")["kind"] == "lora"
    assert all(only(receipt, name)["kind"] == "replacement" for name in base if name != "block.fc.weight")
    merged = merge(paths[0], tmp_path / "out", tmp_path / "merged")
    assert merged["applied"] == merged["expected"] == len(base)
    written = read_checkpoint(tmp_path / "merged")
    for name, W in tuned.items():
        assert (raw(written[name]) == raw(W)) == (name != "block.fc.weight"), name


def test_what_is_dropped_is_listed_with_its_share(tmp_path: Path) -> None:
    base = with_rest(torch.float32)
    tuned = moved(base)
    receipt = extract(*written_pair(tmp_path, base, tuned), tmp_path / "out", rank=2, rest="drop")
    assert [row["name"] for row in receipt["tensors"]] == ["block.fc.weight"]
    assert (receipt["applied"], receipt["expected"]) == (1, len(base))
    left = {row["name"]: row for row in receipt["left_out"]}
    assert set(left) == set(base) - {"block.fc.weight"}
    squares = {name: float((tuned[name].double() - W.double()).norm()) ** 2 for name, W in base.items()}
    for name, row in left.items():
        assert row["relative_norm"] == pytest.approx(squares[name] ** 0.5 / float(base[name].double().norm()), rel=1e-9)
        assert row["share"] == pytest.approx(squares[name] / sum(squares.values()), rel=1e-9)
        assert row["reason"]


def test_the_rest_can_be_an_error_that_names_all_of_it(tmp_path: Path) -> None:
    base = with_rest()
    with pytest.raises(Faults) as caught:
        extract(*written_pair(tmp_path, base, moved(base)), tmp_path / "out", rank=2, rest="error")
    assert {error.tensor for error in caught.value.errors} == set(base) - {"block.fc.weight"}
    assert all(isinstance(error, UnsupportedError) for error in caught.value.errors)
    assert not (tmp_path / "out").exists()


def test_a_module_is_saved_whole_though_half_of_it_changed(tmp_path: Path) -> None:
    base = {
        "fc.weight": noise((16, 12), 1),
        "norm.weight": noise((8,), 2),
        "norm.bias": noise((8,), 3),
        "block.prenorm.weight": noise((8,), 4),
    }
    tuned = dict(base) | {"norm.weight": base["norm.weight"] + 1, "fc.weight": base["fc.weight"] + noise((16, 12), 9)}
    paths = written_pair(tmp_path, base, tuned)
    receipt = extract(*paths, tmp_path / "out", rank=2)
    assert [row["name"] for row in receipt["tensors"]] == ["fc.weight", "norm.weight"]
    # peft saves whole modules, and finds them by the ends of their names
    assert any("norm.bias" in note and "block.prenorm.weight" in note for note in receipt["notes"])
    merge(paths[0], tmp_path / "out", tmp_path / "merged")
    merged = read_checkpoint(tmp_path / "merged")
    assert all(raw(merged[name]) == raw(tuned[name]) for name in base if name != "fc.weight")


def test_an_unchanged_matrix_that_peft_would_target_by_its_ending_is_excluded(tmp_path: Path) -> None:
    base = {"fc.weight": noise((16, 12), 1), "block.fc.weight": noise((16, 12), 2)}
    paths = written_pair(tmp_path, base, dict(base) | {"fc.weight": noise((16, 12), 3)})
    extract(*paths, tmp_path / "out", rank=2)
    assert read_adapter(tmp_path / "out")[1]["exclude_modules"] == ["block.fc"]
    receipt = merge(paths[0], tmp_path / "out", tmp_path / "merged")
    assert [row["name"] for row in receipt["tensors"]] == ["fc.weight"]


def test_a_rank_that_costs_more_than_the_tensor_saves_it_whole(tmp_path: Path) -> None:
    base = {"wide.weight": noise((64, 64), 1).bfloat16(), "score.weight": noise((2, 64), 2).bfloat16()}
    paths = written_pair(tmp_path, base, tuned_of(base))
    receipt = extract(*paths, tmp_path / "out", rank=8)
    assert only(receipt, "wide.weight")["kind"] == "lora"
    assert only(receipt, "score.weight") | {"kind": "replacement", "error": 0.0, "rank": None} == only(receipt, "score.weight")
    assert any("more bytes than the tensor" in note for note in receipt["notes"])
    receipt = extract(*paths, tmp_path / "factors", rank=8, rest="drop")  # nothing is saved whole then: the factors hold all of it
    assert only(receipt, "score.weight")["rank"] == 2
    assert only(receipt, "score.weight")["error"] < 2e-7


def test_unchanged_tensors_and_other_dtypes_of_equal_value_need_nothing(tmp_path: Path) -> None:
    base = {
        "a.weight": noise((8, 8), 1),
        "b.weight": noise((8, 8), 2).bfloat16(),
        "c.weight": noise((8, 8), 3),
        "d.weight": torch.zeros(8, 8),
    }
    tuned = {
        "a.weight": base["a.weight"] + 1,
        "b.weight": base["b.weight"].float(),
        "c.weight": base["c.weight"],
        "d.weight": -base["d.weight"],
    }
    receipt = extract(*written_pair(tmp_path, base, tuned), tmp_path / "out", rank=1)
    assert [row["name"] for row in receipt["tensors"]] == ["a.weight"]
    assert receipt["expected"] == 1
    assert "the base has BF16 where the fine-tune has F32" in receipt["notes"]


# -- which tensors


def test_include_and_exclude(pair: tuple[Path, Path], tmp_path: Path) -> None:
    receipt = extract(*pair, tmp_path / "out", rank=2, include=["*self_attn*", "model.norm"], exclude=["*.k_proj", "*layers.1*"])
    names = {f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "qvo"} | {"model.norm.weight"}
    assert {row["name"] for row in receipt["tensors"]} == names
    reasons = {row["name"]: row["reason"] for row in receipt["left_out"]}
    assert reasons["model.layers.0.self_attn.k_proj.weight"] == "in --exclude"
    assert reasons["lm_head.weight"] == "not in --include"
    assert len(reasons) + len(names) == receipt["expected"] == len(llama_tensors())
    assert all(row["share"] > 0 for row in receipt["left_out"])


def test_names_and_shapes_that_do_not_meet_are_listed_all_together(tmp_path: Path) -> None:
    base = {"a.weight": noise((8, 8), 1), "b.weight": noise((8, 8), 2), "c.weight": noise((8, 8), 3)}
    tuned = {"a.weight": base["a.weight"] + 1, "b.weight": noise((9, 8), 4), "d.weight": noise((8, 8), 5)}
    paths = written_pair(tmp_path, base, tuned)
    with pytest.raises(Faults) as caught:
        extract(*paths, tmp_path / "out", rank=1)
    text = str(caught.value)
    assert {error.tensor for error in caught.value.errors} == {"b.weight", "c.weight", "d.weight"}
    assert "c.weight: only in the base" in text
    assert "d.weight: only in the fine-tune" in text
    assert "b.weight: shapes differ: found [9, 8], expected [8, 8]" in text
    assert not (tmp_path / "out").exists()
    receipt = extract(*paths, tmp_path / "out", rank=1, exclude=["b", "c", "d"])
    assert {row["name"]: row["reason"] for row in receipt["left_out"]} == {
        "b.weight": "in --exclude; shapes differ",
        "c.weight": "in --exclude; only in the base",
        "d.weight": "in --exclude; only in the fine-tune",
    }
    assert [row["name"] for row in receipt["tensors"]] == ["a.weight"]


# -- budgets


def total_error(receipt: Mapping[str, Any], paths: tuple[Path, Path]) -> float:
    """The whole squared error that an extraction leaves, from the receipt's rows and what it left out."""
    base, tuned = (read_checkpoint(path) for path in paths)
    norm = {name: float((tuned[name].double() - W.double()).norm()) for name, W in base.items()}
    rows = sum((row["error"] * norm[row["name"]]) ** 2 for row in receipt["tensors"])
    return rows + sum(norm[row["name"]] ** 2 for row in receipt["left_out"])


@pytest.fixture
def uneven(tmp_path: Path) -> tuple[Path, Path]:
    """Matrices of several shapes and spectra, norms and biases beside them."""
    base, tuned = {}, {}
    for index, (rows, columns, kind) in enumerate(
        [(48, 40, "steep"), (64, 32, "flat"), (80, 72, "power"), (40, 40, "low"), (56, 100, "power")]
    ):
        name = f"layers.{index}.proj"
        base |= {
            f"{name}.weight": noise((rows, columns), index),
            f"{name}.bias": noise((rows,), index),
            f"{name}_norm.weight": noise((rows,), index),
        }
        tuned |= {
            f"{name}.weight": base[f"{name}.weight"]
            + (1 + index) * with_spectrum(spectrum(kind, min(rows, columns)), rows, columns).float()
        }
        tuned |= {other: base[other] + 0.1 for other in (f"{name}.bias", f"{name}_norm.weight")}
    return written_pair(tmp_path, base, tuned)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_budget_is_kept_and_beats_a_uniform_rank_of_the_same_size(
    uneven: tuple[Path, Path], tmp_path: Path, rank: int, dtype: str
) -> None:
    uniform = extract(*uneven, tmp_path / "uniform", rank=rank, dtype=dtype)
    size = (tmp_path / "uniform" / "adapter_model.safetensors").stat().st_size + 200  # the plan's slack: digits of offsets in the header
    fitted = extract(*uneven, tmp_path / "fitted", size=size, dtype=dtype)
    assert (tmp_path / "fitted" / "adapter_model.safetensors").stat().st_size <= size
    assert total_error(fitted, uneven) <= total_error(uniform, uneven) * (1 + 1e-6)
    assert fitted["applied"] + len(fitted["left_out"]) == fitted["expected"] == uniform["expected"]


def test_all_budgets_are_kept_down_to_the_least_which_the_error_tells(uneven: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--size is too small.*at least \d+ bytes") as caught:
        extract(*uneven, tmp_path / "out", size=100)
    least = int(str(caught.value.expected).split()[-2])
    with pytest.raises(OptionError, match="too small"):
        extract(*uneven, tmp_path / "out", size=least - 1)
    errors = []
    for index, size in enumerate([least, least + 700, 12_345, 20_000, "64kB", "1MiB"]):
        receipt = extract(*uneven, tmp_path / f"out{index}", size=size)
        written = (tmp_path / f"out{index}" / "adapter_model.safetensors").stat().st_size
        assert written <= (size if isinstance(size, int) else 64_000 if size == "64kB" else 1 << 20)
        errors.append(total_error(receipt, uneven))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9 * errors[0]  # a budget that everything fits in leaves nothing out


@pytest.mark.parametrize("size", ["1B", "100B"])  # not even a header fits in the first
def test_a_budget_without_anything_saved_has_a_least_too(uneven: tuple[Path, Path], tmp_path: Path, size: str) -> None:
    with pytest.raises(OptionError) as caught:
        extract(*uneven, tmp_path / "out", size=size, rest="drop")
    least = int(str(caught.value.expected).split()[-2])
    receipt = extract(*uneven, tmp_path / "out", size=least, rest="drop")
    assert len(receipt["tensors"]) == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size <= least
    assert any(row["reason"] == "no room for it under --size" for row in receipt["left_out"])


def test_a_budget_counts_a_tied_head_twice(tmp_path: Path) -> None:
    base = llama_tensors(hidden=16, vocabulary=200, head=False)
    paths = written_pair(tmp_path, base, tuned_of(base), llama_config(tie_word_embeddings=True, vocab_size=200))
    receipt = extract(*paths, tmp_path / "out", size=30_000)
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size <= 30_000
    assert only(receipt, "lm_head.weight")["rank"] == only(receipt, "model.embed_tokens.weight")["rank"] > 0


# -- how it is written


def test_alpha_is_the_rank_unless_given_and_the_function_is_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    extract(*pair, tmp_path / "plain", rank=4, rest="drop")
    extract(*pair, tmp_path / "given", rank=4, rest="drop", alpha=32)
    _, plain = read_adapter(tmp_path / "plain")
    _, given_ = read_adapter(tmp_path / "given")
    assert (plain["r"], plain["lora_alpha"], given_["lora_alpha"]) == (4, 4, 32)
    one, other = load(tmp_path / "plain"), load(tmp_path / "given")
    for name in one:
        # float32 factors, each rounded once: √2·2⁻²⁴, doubled for two of them
        assert float((dense(one[name]) - dense(other[name])).norm()) <= 2e-7 * float(dense(one[name]).norm())


@pytest.mark.parametrize(
    ("dtype", "code"), [(None, torch.float32), ("float16", torch.float16), ("bf16", torch.bfloat16), ("float64", torch.float64)]
)
def test_dtype_of_the_factors(pair: tuple[Path, Path], tmp_path: Path, dtype: str | None, code: torch.dtype) -> None:
    receipt = extract(*pair, tmp_path / "out", rank=4, rest="drop", dtype=dtype)
    tensors, _ = read_adapter(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {code}
    base, tuned, found = read_checkpoint(pair[0]), read_checkpoint(pair[1]), load(tmp_path / "out")
    for name, delta in found.items():
        exact = tuned[name].double() - base[name].double()
        error = float((exact - dense(delta)).norm() / exact.norm())
        assert only(receipt, name)["error"] == pytest.approx(error, rel=1e-5)  # the residual's blocks are float32


def test_the_receipt_says_what_went_in_and_what_came_out(pair: tuple[Path, Path], tmp_path: Path) -> None:
    receipt = extract(*pair, tmp_path / "out", rank=2, sha256=True)
    assert json.loads((tmp_path / "out" / "loratools.json").read_text()) == receipt
    assert [row["role"] for row in receipt["inputs"]] == ["base", "tuned"]
    assert receipt["inputs"][0]["blake3"] != receipt["inputs"][1]["blake3"]
    assert receipt["inputs"][0]["header_sha256"] == receipt["inputs"][1]["header_sha256"]
    assert {row["path"] for row in receipt["outputs"]} == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(len(row["sha256"]) == 64 for row in receipt["outputs"])
    assert set(receipt["digests"]) == set(read_adapter(tmp_path / "out")[0])
    merged = merge(pair[0], tmp_path / "out", tmp_path / "merged")
    made = {row["blake3"] for row in receipt["outputs"]}
    assert {row["blake3"] for row in merged["inputs"] if row["role"] == "adapter"} == made
    assert merged["inputs"][0]["blake3"] == receipt["inputs"][0]["blake3"]


def test_relative_norm_and_unchanged_are_those_of_the_pair(tmp_path: Path) -> None:
    base = {"q.weight": noise((16, 16), 1)}
    tuned = {"q.weight": base["q.weight"].clone()}
    tuned["q.weight"][:4] *= 2
    row = only(extract(*written_pair(tmp_path, base, tuned), tmp_path / "out", rank=2), "q.weight")
    assert row["unchanged"] == 0.75
    assert row["relative_norm"] == pytest.approx(float(base["q.weight"][:4].norm() / base["q.weight"].norm()), rel=1e-6)


@pytest.mark.parametrize(("stated", "written"), [("org/model", "org/model"), ("/home/someone/model", None), ("model", None), (None, None)])
def test_the_base_is_named_only_by_a_hub_id(tmp_path: Path, stated: str | None, written: str | None) -> None:
    base = {"q.weight": noise((8, 8), 1)}
    extract(*written_pair(tmp_path, base, tuned_of(base), {"_name_or_path": stated}), tmp_path / "out", rank=1)
    assert read_adapter(tmp_path / "out")[1]["base_model_name_or_path"] == written


def test_progress_ends_at_all_of_the_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    extract(*pair, tmp_path / "out", rank=2, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] == 2 * sum(W.numel() * 4 for W in llama_tensors(hidden=16).values())


# -- refused


@pytest.mark.parametrize(
    "options",
    [
        {}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"rank": True}, {"energy": 0.0}, {"energy": 1.5}, {"max_error": 0.0},
        {"max_error": 1.0},
        {"size": "many"}, {"size": "-3MB"}, {"size": 10}, {"rank": 2, "alpha": 0.0}, {"rank": 2, "alpha": float("nan")},
        {"rank": 2, "rest": "keep"}, {"rank": 2, "dtype": "int8"}, {"rank": 2, "format": "nothing"}, {"rank": 2, "tolerance": 0.0},
        {"rank": 2, "threads": 0}, {"rank": 2, "device": "nowhere"}, {"rank": 2, "device": "meta"},
        {"rank": 2, "include": ["*typo*"]}, {"rank": 2, "exclude": ["*typo*"]},
        {"rank": 2, "embedding": ["typo"]}, {"rank": 2, "transposed": ["typo"]},
        # nothing is left to write
        {"rank": 2, "include": ["*norm*"], "rest": "drop"},
        # bfloat16 factors are never that near, and may not be replaced by the whole tensor
        {"max_error": 1e-5, "dtype": "bf16", "rest": "drop"},
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(pair: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        extract(*pair, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_equal_checkpoints_have_no_difference(pair: tuple[Path, Path], tmp_path: Path) -> None:
    copy = write_checkpoint(tmp_path / "copy", llama_tensors(hidden=16), llama_config(), shards=2)
    with pytest.raises(MatchError, match="nothing to extract"):
        extract(pair[0], copy, tmp_path / "out", rank=1)


def test_values_that_are_no_numbers_name_file_and_tensor(tmp_path: Path) -> None:
    base = {"q.weight": noise((8, 8), 1), "k.weight": noise((8, 8), 2)}
    tuned = tuned_of(base)
    tuned["k.weight"][3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"tuned: k\.weight: the tuned tensor holds inf or nan"):
        extract(*written_pair(tmp_path, base, tuned), tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


def test_factors_that_overflow_their_dtype_name_the_tensor(tmp_path: Path) -> None:
    base = {"q.weight": torch.zeros(8, 8)}
    paths = written_pair(tmp_path, base, {"q.weight": noise((8, 8), 1) * 1e30})
    with pytest.raises(NonFiniteError, match=r"q\.weight: a factor would not be finite in float16"):
        extract(*paths, tmp_path / "out", rank=1, dtype="float16", alpha=1, rest="drop")


def test_quantised_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    base = {"q.weight": noise((8, 8), 1)}
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    plain, quantised = write_checkpoint(tmp_path / "plain", base), write_checkpoint(tmp_path / "quantised", tuned_of(base), config)
    for one, other in ((plain, quantised), (quantised, plain)):
        with pytest.raises(QuantizedError, match=r"quantised.*bitsandbytes"):
            extract(one, other, tmp_path / "out", rank=1)


def test_an_output_is_not_overwritten_unasked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    extract(*pair, tmp_path / "out", rank=1)
    with pytest.raises(OutputError, match="exists already"):
        extract(*pair, tmp_path / "out", rank=2)
    extract(*pair, tmp_path / "out", rank=2, overwrite=True)
    assert read_adapter(tmp_path / "out")[1]["r"] == 2
    with pytest.raises(LoratoolsError):
        extract(*pair, pair[0] / "inside", rank=1)
