"""merge, from files to files: laws on bytes, ties, vocabularies, new heads, strengths, and that no failure leaves an output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools import merge
from loratools.errors import AmbiguousError, LoratoolsError, MatchError, NonFiniteError, OptionError, ShapeError, UnsupportedError
from tests.files import llama_config, llama_tensors, peft_config, raw, read_checkpoint, read_config, write_adapter, write_checkpoint
from tests.strategies import FLOATS, randn

ROOT = "base_model.model."
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def lora(base: dict[str, Tensor], targets: list[str], *, rank: int = 2, seed: int = 0, dora: bool = False) -> dict[str, Tensor]:
    """peft's tensors for every targeted matrix of a base."""
    tensors = {}
    for index, (name, W) in enumerate(base.items()):
        module = name.removesuffix(".weight")
        if not any(module.endswith(target) for target in targets):
            continue
        if "embed_tokens" in module:
            pair = {
                "lora_embedding_A": randn(rank, W.shape[0], seed=seed + index),
                "lora_embedding_B": randn(W.shape[1], rank, seed=seed + index + 1),
            }
        else:
            pair = {
                "lora_A.weight": randn(rank, W.shape[1], seed=seed + index),
                "lora_B.weight": randn(W.shape[0], rank, seed=seed + index + 1),
            }
        if dora:
            pair["lora_magnitude_vector"] = 1 + randn(W.shape[1 if "embed_tokens" in module else 0], seed=seed).square()
        tensors |= {f"{ROOT}{module}.{key}": tensor for key, tensor in pair.items()}
    return tensors


def adapter(
    folder: Path, base: dict[str, Tensor], targets: list[str], extra: dict[str, Tensor] | None = None, *, seed: int = 0, **config: Any
) -> Path:
    tensors = lora(base, targets, seed=seed, dora=bool(config.get("use_dora"))) | {
        ROOT + key: tensor for key, tensor in (extra or {}).items()
    }
    return write_adapter(folder, tensors, peft_config(target_modules=targets or ["none"]) | config)


def made(tmp_path: Path) -> list[str]:
    """What lies in the folder beside the inputs, hidden files too."""
    return sorted(path.name for path in tmp_path.iterdir() if path.name not in ("base", "a", "b"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dora", [False, True])
def test_same_bytes_for_any_threads_and_shards(tmp_path: Path, dtype: torch.dtype, dora: bool) -> None:
    tensors = llama_tensors(dtype, vocabulary=201, hidden=40)
    adapter(tmp_path / "a", tensors, [*TARGETS, "embed_tokens"], use_dora=dora)
    results = []
    for threads, shards in ((1, 1), (2, 1), (3, 1), (2, 3)):
        base, out = tmp_path / f"base{shards}", tmp_path / f"out{threads}{shards}"
        if not base.exists():
            write_checkpoint(base, tensors, llama_config(), shards=shards)
        receipt = merge(base, tmp_path / "a", out, threads=threads)
        results.append({name: raw(tensor) for name, tensor in read_checkpoint(out).items()})
        assert receipt["applied"] == receipt["expected"] == 9
        assert sorted(path.name for path in out.iterdir()) == sorted([*(path.name for path in base.iterdir()), "loratools.json"])
    assert results[0] == results[1] == results[2] == results[3]
    assert results[0].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (results[0][name] == raw(tensor)) == (not any(target in name for target in [*TARGETS, "embed_tokens"]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_strength_zero_gives_the_bases_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = llama_tensors(dtype)
    tensors["model.norm.weight"][:] = float("nan")
    tensors[EMBEDDING][0] = -0.0
    write_checkpoint(tmp_path / "base", tensors, llama_config(), shards=2)
    adapter(tmp_path / "a", tensors, [*TARGETS, "embed_tokens"], {HEAD: randn(19, 8, seed=1)}, use_dora=True)
    receipt = merge(tmp_path / "base", f"{tmp_path / 'a'}:0", tmp_path / "out")
    for path in (tmp_path / "base").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert receipt["applied"] == receipt["expected"] == 10 and receipt["tensors"] == []


def test_what_no_delta_touches_is_copied_whatever_it_is(base: Path, tmp_path: Path) -> None:
    tensors = llama_tensors() | {
        "counter": torch.tensor(2**60 + 1),
        "mask": torch.tensor([True, False]),
        "cache": torch.full((2, 2), float("nan")).to(torch.float8_e4m3fn),
    }
    tensors["empty"] = torch.empty(0, 4)
    write_checkpoint(base, tensors, llama_config())
    adapter(tmp_path / "a", tensors, ["q_proj"])
    merge(base, tmp_path / "a", tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")
    assert all(
        raw(merged[name]) == raw(tensor) and merged[name].dtype == tensor.dtype for name, tensor in tensors.items() if "q_proj" not in name
    )


def test_a_minus_undoes_a_plus_but_for_rounding(base: Path, tmp_path: Path) -> None:
    tensors = llama_tensors()
    adapter(tmp_path / "a", tensors, TARGETS)
    merge(base, tmp_path / "a", tmp_path / "plus")
    merge(tmp_path / "plus", f"{tmp_path / 'a'}:-1", tmp_path / "back")
    plus, back = read_checkpoint(tmp_path / "plus"), read_checkpoint(tmp_path / "back")
    for name, W in tensors.items():
        size = max(float(plus[name].abs().max()), float(W.abs().max()))
        assert float((back[name] - W).abs().max()) <= 2 * 2.0**-24 * size  # one rounding each way


def test_another_dtype(base: Path, tmp_path: Path) -> None:
    tensors = llama_tensors()
    adapter(tmp_path / "a", tensors, TARGETS)
    merge(base, tmp_path / "a", tmp_path / "wide", dtype="float64")
    merge(base, tmp_path / "a", tmp_path / "narrow", dtype="bf16")
    wide, narrow = read_checkpoint(tmp_path / "wide"), read_checkpoint(tmp_path / "narrow")
    assert {tensor.dtype for tensor in wide.values()} == {torch.float64} and {tensor.dtype for tensor in narrow.values()} == {
        torch.bfloat16
    }
    for name, tensor in wide.items():
        assert torch.allclose(narrow[name].double(), tensor, rtol=2.0**-8, atol=0)  # rounded once from float64


# -- several adapters, strengths


def test_saved_tensors_meet_only_their_like(base: Path, tmp_path: Path) -> None:
    tensors, saved = llama_tensors(), {"model.norm.weight": randn(8, seed=5)}
    adapter(tmp_path / "a", tensors, ["q_proj"], saved, modules_to_save=["model.norm"])
    adapter(tmp_path / "b", tensors, ["v_proj"], saved, modules_to_save=["model.norm"])
    receipt = merge(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert receipt["applied"] == receipt["expected"] == 6
    assert torch.equal(read_checkpoint(tmp_path / "out")["model.norm.weight"], saved["model.norm.weight"])
    with pytest.raises(MatchError, match=r"model\.norm\.weight: several adapters replace this tensor alike"):
        merge(base, [tmp_path / "a", f"{tmp_path / 'b'}:0.5"], tmp_path / "other")
    adapter(tmp_path / "b", tensors, ["v_proj"], {"model.norm.weight": randn(8, seed=6)}, modules_to_save=["model.norm"])
    with pytest.raises(MatchError, match=r"model\.norm\.weight: several adapters change this tensor, and one replaces it"):
        merge(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "other")
    assert made(tmp_path) == ["out"]


def test_a_saved_tensor_at_half_strength_is_half_way(base: Path, tmp_path: Path) -> None:
    tensors, value = llama_tensors(), randn(8, seed=5)
    adapter(tmp_path / "a", tensors, ["q_proj"], {"model.norm.weight": value}, modules_to_save=["model.norm"])
    merge(base, f"{tmp_path / 'a'}:0.5", tmp_path / "out")
    found = read_checkpoint(tmp_path / "out")["model.norm.weight"]
    assert torch.allclose(found, (tensors["model.norm.weight"] + value) / 2, rtol=2.0**-23)


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf", "1e999"])
def test_a_strength_is_finite(base: Path, tmp_path: Path, strength: str) -> None:
    adapter(tmp_path / "a", llama_tensors(), ["q_proj"])
    with pytest.raises(OptionError, match="finite"):
        merge(base, f"{tmp_path / 'a'}:{strength}", tmp_path / "out")
    assert made(tmp_path) == []


# -- new heads, vocabularies


@pytest.mark.parametrize("shards", [1, 3])
def test_a_new_head_is_added_and_said(tmp_path: Path, shards: int) -> None:
    tensors, head = llama_tensors(), randn(3, 8, seed=2)
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(), shards=shards)
    adapter(tmp_path / "a", tensors, ["q_proj"], {"score.weight": head}, task_type="SEQ_CLS")
    receipt = merge(base, tmp_path / "a", tmp_path / "out")
    assert receipt["notes"] == ["added: score.weight F32 [3, 8], which the base lacks"]
    merged = read_checkpoint(tmp_path / "out")
    assert torch.equal(merged["score.weight"], head) and merged.keys() == {*tensors, "score.weight"}
    if shards > 1:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == merged.keys()
        assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in merged.values())
    with pytest.raises(ShapeError, match=r"score\.weight: a tensor that is new.*has strength 1"):
        merge(base, f"{tmp_path / 'a'}:0.5", tmp_path / "half")


@pytest.mark.parametrize("rows", [11, 23])
def test_a_resized_vocabulary(base: Path, tmp_path: Path, rows: int) -> None:
    tensors = llama_tensors()
    saved = {EMBEDDING: randn(rows, 8, seed=1), HEAD: randn(rows, 8, seed=2)}
    adapter(tmp_path / "a", tensors, ["q_proj"], saved)
    receipt = merge(base, tmp_path / "a", tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")
    assert all(torch.equal(merged[name], value) for name, value in saved.items())
    assert read_config(tmp_path / "out")["vocab_size"] == rows and receipt["changed_files"] == ["config.json"]
    assert sum(note.startswith("resized: ") for note in receipt["notes"]) == 2


def test_a_vocabulary_resized_by_half(base: Path, tmp_path: Path) -> None:
    tensors = llama_tensors()
    adapter(tmp_path / "a", tensors, ["q_proj"], {EMBEDDING: randn(23, 8, seed=1)})
    with pytest.raises(ShapeError, match=r"lm_head\.weight: the adapter resizes the vocabulary"):
        merge(base, tmp_path / "a", tmp_path / "out")
    adapter(tmp_path / "b", tensors, ["q_proj"], {EMBEDDING: randn(23, 8, seed=1), HEAD: randn(22, 8, seed=1)})
    with pytest.raises(ShapeError, match="two vocabularies of different size"):
        merge(base, tmp_path / "b", tmp_path / "out")
    assert made(tmp_path) == []


# -- ties


def tied_base(tmp_path: Path, *, stored: bool, **config: Any) -> dict[str, Tensor]:
    tensors = llama_tensors(head=False)
    held = tensors | ({HEAD: tensors[EMBEDDING]} if stored else {})
    write_checkpoint(tmp_path / "base", held, llama_config(tie_word_embeddings=True) | config)
    return tensors


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_lora_on_one_of_a_tied_pair(tmp_path: Path, stored: bool, target: str, strength: float) -> None:
    tensors = tied_base(tmp_path, stored=stored)
    name, other = (EMBEDDING, HEAD) if target == "embed_tokens" else (HEAD, EMBEDDING)
    adapter(tmp_path / "a", tensors | {HEAD: tensors[EMBEDDING]}, [target])
    given = f"{tmp_path / 'a'}:{strength}"
    with pytest.raises(UnsupportedError, match=rf"changes {name} alone; give --untie"):
        merge(tmp_path / "base", given, tmp_path / "out")
    assert made(tmp_path) == []
    receipt = merge(tmp_path / "base", given, tmp_path / "out", untie=True)
    merged = read_checkpoint(tmp_path / "out")
    assert raw(merged[other]) == raw(tensors[EMBEDDING]) and not torch.allclose(merged[name], tensors[EMBEDDING])
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is False
    assert receipt["applied"] == receipt["expected"] == 1
    untouched = merge(tmp_path / "base", f"{tmp_path / 'a'}:0", tmp_path / "zero")
    assert untouched["changed_files"] == []


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("rows", [17, 23])
def test_both_saved_alike_stay_tied(tmp_path: Path, stored: bool, rows: int) -> None:
    tensors, value = tied_base(tmp_path, stored=stored), randn(rows, 8, seed=3)
    adapter(tmp_path / "a", tensors, ["q_proj"], {EMBEDDING: value, HEAD: value})
    receipt = merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merged, config = read_checkpoint(tmp_path / "out"), read_config(tmp_path / "out")
    assert (HEAD in merged) == stored and torch.equal(merged[EMBEDDING], value)
    assert config["tie_word_embeddings"] is True and config["vocab_size"] == rows
    assert receipt["applied"] == receipt["expected"] == 4


def test_both_saved_unlike_must_be_untied(tmp_path: Path) -> None:
    tensors, saved = tied_base(tmp_path, stored=False), {EMBEDDING: randn(23, 8, seed=3), HEAD: randn(23, 8, seed=4)}
    adapter(tmp_path / "a", tensors, ["q_proj"], saved)
    with pytest.raises(UnsupportedError, match="each in a way of its own; give --untie"):
        merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", untie=True)
    merged = read_checkpoint(tmp_path / "out")
    assert all(torch.equal(merged[name], value) for name, value in saved.items())


def test_an_adapted_resized_embedding_gives_its_head_the_saved_base(tmp_path: Path) -> None:
    """The head is tied to the embedding's base layer, which the file holds, with the new rows."""
    tensors, value = tied_base(tmp_path, stored=False), randn(23, 8, seed=3)
    adapter(tmp_path / "a", tensors | {EMBEDDING: value}, ["embed_tokens"], {"model.embed_tokens.base_layer.weight": value})
    receipt = merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", untie=True)
    merged = read_checkpoint(tmp_path / "out")
    assert torch.equal(merged[HEAD], value) and merged[EMBEDDING].shape == (23, 8) and not torch.allclose(merged[EMBEDDING], value)
    assert receipt["applied"] == receipt["expected"]


def test_an_untied_model_needs_no_leave(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "a", llama_tensors(), ["embed_tokens", "lm_head"])
    assert merge(base, tmp_path / "a", tmp_path / "out")["changed_files"] == []


# -- transposed squares, names


def test_transposed_squares(tmp_path: Path) -> None:
    W, A, B = randn(6, 6, seed=0), randn(2, 6, seed=1), randn(6, 2, seed=2)
    wide, wide_B = randn(6, 18, seed=3), randn(18, 2, seed=4)
    names = {"h.0.c_proj": (W, B), "h.0.c_attn": (wide, wide_B)}
    keys = {f"{ROOT}{name}.lora_{x}.weight": factor for name, (_, b) in names.items() for x, factor in (("A", A), ("B", b))}
    write_adapter(tmp_path / "a", keys, peft_config(target_modules=["c_proj", "c_attn"], fan_in_fan_out=True))
    for number, (config, options) in enumerate([({"model_type": "gpt2"}, {}), (None, {"transposed": ["*.c_proj"]})]):
        base = write_checkpoint(tmp_path / f"base{number}", {f"{name}.weight": tensor for name, (tensor, _) in names.items()}, config)
        merge(base, tmp_path / "a", tmp_path / f"out{number}", **options)
        merged = read_checkpoint(tmp_path / f"out{number}")
        assert torch.allclose(merged["h.0.c_proj.weight"], W + 2 * (B @ A).T, atol=1e-5)
        assert torch.allclose(merged["h.0.c_attn.weight"], wide + 2 * (wide_B @ A).T, atol=1e-5)
    with pytest.raises(AmbiguousError, match=r"h\.0\.c_proj\.weight: a square weight"):
        merge(tmp_path / "base1", tmp_path / "a", tmp_path / "refused")


def test_a_prefix_is_aligned_and_said(base: Path, tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in llama_tensors(head=False).items()}
    adapter(tmp_path / "a", bare, ["q_proj"])
    receipt = merge(base, tmp_path / "a", tmp_path / "out")
    assert receipt["notes"] == ["names aligned for the whole adapter: prefix 'model.' added"] and receipt["applied"] == 2


# -- failures


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shards", [1, 3])
def test_an_overflow_names_the_tensor_and_leaves_nothing(tmp_path: Path, shards: int, threads: int) -> None:
    tensors = llama_tensors(torch.float16)
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(), shards=shards)
    huge = lora(tensors, TARGETS)
    huge[f"{ROOT}model.layers.1.mlp.up_proj.lora_B.weight"][3, 1] = 1e5
    write_adapter(tmp_path / "a", huge, peft_config(target_modules=TARGETS))
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: would not be finite in float16"):
        merge(base, tmp_path / "a", tmp_path / "out", threads=threads)
    assert made(tmp_path) == []
    merge(base, tmp_path / "a", tmp_path / "out", dtype="float32", threads=threads)


def test_a_failure_leaves_an_existing_output_as_it_was(base: Path, tmp_path: Path) -> None:
    tensors = llama_tensors()
    adapter(tmp_path / "a", tensors, TARGETS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept.txt").write_text("kept")
    bad = lora(tensors, TARGETS) | {f"{ROOT}x.lora_A.weight": randn(2, 2, seed=0)}
    write_adapter(tmp_path / "b", bad, peft_config(target_modules=TARGETS))
    with pytest.raises(LoratoolsError):
        merge(base, tmp_path / "a", tmp_path / "out")
    with pytest.raises(LoratoolsError):
        merge(base, tmp_path / "b", tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept.txt"] and made(tmp_path) == ["out"]
    merge(base, tmp_path / "a", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/kept.txt").exists()


def test_a_base_that_is_a_folder_gives_no_folder_named_as_a_file(base: Path, tmp_path: Path) -> None:
    given = adapter(tmp_path / "adapter", read_checkpoint(base), TARGETS)
    out = tmp_path / "room" / "merged.safetensors"
    with pytest.raises(OptionError, match="a folder gives a folder"):
        merge(base, given, out)
    assert list(out.parent.iterdir()) == []
