"""unmerge: every byte comes back, whatever was merged; every changed bit is noticed; the record stays small."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from torch import Tensor

from loratools.checkpoint import Checkpoint
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError, LoratoolsError, MatchError, NotInvertible, OptionError
from loratools.formats import load
from loratools.ops.merge import merge
from loratools.ops.unmerge import Undoing, unmerge
from loratools.ops.verify import verify
from loratools.record import Record, Spool, record_path
from tests.files import llama_config, peft_config, raw, read_checkpoint, write_adapter, write_checkpoint

ROOT = "base_model.model."
SCHEMA = jsonschema.Draft202012Validator(json.loads((Path(__file__).parents[2] / "spec" / "receipt.schema.json").read_text()))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def assert_same_files(one: Path, other: Path) -> None:
    """Every file of the one is in the other byte for byte, which has its receipt besides."""
    names = {path.name for path in one.iterdir()}
    assert {path.name for path in other.iterdir()} == names | {"loratools.json"}
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def network(dtype: torch.dtype, *, rows: int = 48, columns: int = 160, vocabulary: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """A network of three weights, an embedding, a head and a norm."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (vocabulary, columns),
        "model.layers.0.mlp.down_proj.weight": (rows, columns),
        "model.layers.0.mlp.up_proj.weight": (columns, rows),
        "model.layers.0.self_attn.q_proj.weight": (rows, columns),
        "model.norm.weight": (columns,),
        "lm_head.weight": (vocabulary, columns),
    }
    return {name: (0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for name, shape in shapes.items()}


def factors(shape: tuple[int, int], module: str, ratio: float, *, rank: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """A LoRA of a peft file whose ΔW is `ratio` times as large as the network's weights; alpha is twice the rank."""
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    scale = ratio * 0.02 / (2 * rank**0.5)
    return {f"{ROOT}{module}.lora_A.weight": A, f"{ROOT}{module}.lora_B.weight": scale * B}


def adapter(folder: Path, tensors: dict[str, Tensor], ratio: float, *, dora: bool = False, rank: int = 4, seed: int = 1) -> Path:
    """LoRA or DoRA on the three weights, the DoRA's factors g within 1 % of 1."""
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed + 100)
    for index, module in enumerate(("model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj")):
        W = tensors[f"{module}.weight"].double()
        made = factors((W.shape[0], W.shape[1]), module, ratio, rank=rank, seed=seed + index)
        found |= made
        if dora:
            B, A = made[f"{ROOT}{module}.lora_B.weight"].double(), made[f"{ROOT}{module}.lora_A.weight"].double()
            g = 1 + 0.01 * (2 * torch.rand(W.shape[0], generator=generator, dtype=torch.float64) - 1)
            found[f"{ROOT}{module}.lora_magnitude_vector.weight"] = (g * (W + 2 * B @ A).norm(dim=1)).float()
    targets = ["down_proj", "up_proj", "q_proj"]
    return write_adapter(folder, found, peft_config(r=rank, lora_alpha=2 * rank, target_modules=targets, use_dora=dora))


def roundtrip(tmp_path: Path, base: Path, adapters: Any, **options: Any) -> dict[str, Any]:
    """Merge reversibly with two threads, check, undo with one thread, compare; returns the merge's receipt."""
    receipt = merge(base, adapters, tmp_path / "merged", reversible=True, threads=2, **options)
    assert verify(tmp_path / "merged")["faults"] == []
    undone = unmerge(tmp_path / "merged", tmp_path / "again", threads=1)
    assert undone["applied"] == undone["expected"] == receipt["expected"]
    for told in (receipt, undone):
        SCHEMA.validate(told)
    assert_same_files(base, tmp_path / "again")
    assert verify(tmp_path / "again")["faults"] == []
    return receipt


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("ratio", [1e-5, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_size_of_change(tmp_path: Path, name: str, ratio: float, dora: bool) -> None:
    tensors = network(DTYPES[name])
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(), shards=2)
    receipt = roundtrip(tmp_path, base, adapter(tmp_path / "adapter", tensors, ratio, dora=dora))
    assert receipt["unmerge"]["bytes"] == record_path(tmp_path / "merged", folder=True).stat().st_size
    changed = [row["name"] for row in receipt["tensors"]]
    before, after = Checkpoint(base), Checkpoint(tmp_path / "merged")
    assert len(changed) == 3
    # 1e-5 of a weight is less than half of bfloat16's last place for almost all: that the others differ is what is undone
    assert any(bytes(before[key].read()) != bytes(after[key].read()) for key in changed)


# -- what can be merged


def test_several_at_once_come_off_at_once(tmp_path: Path) -> None:
    tensors = network(torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(), shards=3)
    one, two = adapter(tmp_path / "one", tensors, 1e-2), adapter(tmp_path / "two", tensors, 1e-2, dora=True, seed=7)
    receipt = roundtrip(tmp_path, base, [f"{one}:0.7", two, f"{one}:-0.3"])
    assert receipt["applied"] == 9 and not receipt["unmerge"]["whole"]


def test_a_magnitude_for_each_input(tmp_path: Path) -> None:
    """peft's DoRA on an embedding has one norm for each of the embedding's dimensions, which are its columns."""
    tensors = network(torch.float32)
    W = tensors["model.embed_tokens.weight"]
    base = write_checkpoint(tmp_path / "base", tensors, llama_config())
    generator = torch.Generator().manual_seed(0)
    root = f"{ROOT}model.embed_tokens"
    made = {
        f"{root}.lora_embedding_A": torch.randn(2, 24, generator=generator),
        f"{root}.lora_embedding_B": 1e-4 * torch.randn(160, 2, generator=generator),
        f"{root}.lora_magnitude_vector": W.norm(dim=0) * (1 + 0.01 * torch.randn(160, generator=generator)),
    }
    given = write_adapter(tmp_path / "adapter", made, peft_config(target_modules=["embed_tokens"], use_dora=True))
    assert roundtrip(tmp_path, base, given)["tensors"][0]["kind"] == "dora"


@pytest.mark.parametrize("rows", [11, 24, 40])
def test_saved_tensors_and_a_resized_vocabulary(tmp_path: Path, rows: int) -> None:
    tensors = network(torch.float16)
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(vocab_size=24), shards=2)
    (base / "tokenizer.json").write_text("{}")
    given = adapter(tmp_path / "adapter", tensors, 1e-2)
    saved = {f"{ROOT}{name}": torch.randn(rows, 160).half() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    saved[f"{ROOT}model.norm.weight"] = torch.randn(160).half()
    config = json.loads((given / "adapter_config.json").read_text()) | {"modules_to_save": ["norm"]}
    write_adapter(given, read_checkpoint(given) | saved, config)
    receipt = roundtrip(tmp_path, base, given)
    assert ("config.json" in receipt["changed_files"]) == (rows != 24)
    # what was replaced by something unrelated is cheaper whole
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(receipt["unmerge"]["whole"])


def test_rows_added_to_a_vocabulary_cost_nothing(tmp_path: Path) -> None:
    """A resized embedding whose old rows are the base's predicts them."""
    tensors = network(torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(vocab_size=24))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    saved = {f"{ROOT}{name}": torch.cat([tensors[name], torch.randn(9, 160).bfloat16()]) for name in names}
    given = write_adapter(tmp_path / "adapter", saved, peft_config(target_modules=["none"]))
    receipt = roundtrip(tmp_path, base, given)
    assert receipt["unmerge"]["whole"] == [] and {row["kind"] for row in receipt["tensors"]} == {"replacement"}


def test_a_head_that_was_untied_and_one_that_was_added(tmp_path: Path) -> None:
    tensors = network(torch.bfloat16)
    del tensors["lm_head.weight"]
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(vocab_size=24, tie_word_embeddings=True), shards=2)
    made = factors((24, 160), "lm_head", 1e-2) | {f"{ROOT}score.weight": torch.randn(3, 160)}
    given = write_adapter(tmp_path / "adapter", made, peft_config(r=4, lora_alpha=8, target_modules=["lm_head"], modules_to_save=["score"]))
    receipt = roundtrip(tmp_path, base, given, untie=True)
    assert {"config.json", "model.safetensors.index.json"} == set(receipt["changed_files"])
    assert receipt["digests"].keys() - tensors.keys() == {"lm_head.weight", "score.weight"}


@pytest.mark.parametrize(("before", "after"), [("bf16", "float32"), ("fp32", "bfloat16"), ("fp64", "float16")])
def test_another_dtype(tmp_path: Path, before: str, after: str) -> None:
    tensors = network(DTYPES[before])
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(torch_dtype=before))
    receipt = roundtrip(tmp_path, base, adapter(tmp_path / "adapter", tensors, 1e-2), dtype=after)
    if before == "bf16":  # float32 tells each bfloat16 weight: nothing is left to write down
        assert receipt["unmerge"]["whole"] == []


def test_a_strength_of_zero_needs_no_adapter_to_come_off(tmp_path: Path) -> None:
    tensors = network(torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", tensors, llama_config())
    given = adapter(tmp_path / "adapter", tensors, 1e-2)
    merge(base, f"{given}:0", tmp_path / "merged", reversible=True)
    shutil.rmtree(given)
    unmerge(tmp_path / "merged", tmp_path / "again")
    assert_same_files(base, tmp_path / "again")


@pytest.mark.parametrize("name", DTYPES)
def test_special_values(tmp_path: Path, name: str) -> None:
    """Both zeros, the least and the largest numbers, and half of the weights pruned; +0 is what a lost weight is taken for."""
    dtype = DTYPES[name]
    tensors = network(dtype)
    kind, q = torch.finfo(dtype), "model.layers.0.self_attn.q_proj.weight"
    generator = torch.Generator().manual_seed(3)
    for key in list(tensors):
        tensors[key] = torch.where(torch.rand(tensors[key].shape, generator=generator) < 0.5, tensors[key], torch.zeros((), dtype=dtype))
    special = [-0.0, 0.0, kind.tiny, -kind.tiny, kind.tiny * kind.eps, kind.max / 2, -kind.max / 2, 1.0, -1.0, kind.eps]
    tensors[q][0, : len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)
    tensors[q][1, :50] = -0.0
    base = write_checkpoint(tmp_path / "base", tensors, llama_config())
    receipt = roundtrip(tmp_path, base, adapter(tmp_path / "adapter", tensors, 1e-2))
    assert receipt["unmerge"]["whole"] == []


def test_a_header_that_another_program_wrote(tmp_path: Path) -> None:
    """Its key order, its spaces and its padding come back, too."""
    tensors = network(torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", tensors, llama_config())
    order = sorted(tensors, key=lambda name: name[::-1])
    table: dict[str, Any] = {"__metadata__": {"z": "last", "a": "first"}}
    at, entries = 0, {}
    for name in order:
        size = tensors[name].numel() * 2
        entries[name] = {"shape": list(tensors[name].shape), "data_offsets": [at, at + size], "dtype": "BF16"}
        at += size
    table = {name: entries[name] for name in sorted(entries)} | table
    header = (json.dumps(table, indent=1) + "   ").encode()
    data = b"".join(raw(tensors[name]) for name in order)
    (base / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    roundtrip(tmp_path, base, adapter(tmp_path / "adapter", tensors, 1e-2))


def test_one_file(tmp_path: Path) -> None:
    tensors = network(torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", tensors, llama_config()) / "model.safetensors"
    given, again = adapter(tmp_path / "adapter", tensors, 1e-2), tmp_path / "again.safetensors"
    merged = tmp_path / "m" / "merged.safetensors"
    merge(base, given, merged, reversible=True)
    names = ["merged.safetensors", "merged.safetensors.loratools.json", "merged.safetensors.unmerge.safetensors"]
    assert sorted(path.name for path in merged.parent.iterdir()) == names
    assert verify(merged)["faults"] == [] and verify(merged, base=base, adapters=given)["max_ulp"] == 0
    assert len(Checkpoint(merged.parent)) == len(tensors)  # the record is no second model
    unmerge(merged, again)
    assert again.read_bytes() == base.read_bytes() and verify(again)["faults"] == []
    with pytest.raises(OptionError, match="one file gives one file"):
        unmerge(merged, tmp_path / "folder")


# -- what computes it


def test_other_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = network(torch.float32)
    base = write_checkpoint(tmp_path / "base", tensors, llama_config())
    given = [adapter(tmp_path / "one", tensors, 1e-2, dora=True), f"{adapter(tmp_path / 'two', tensors, 1e-2, rank=20)}:0.5"]
    merge(base, given, tmp_path / "merged", reversible=True, threads=2)
    for block in (1, 999, 5000):
        monkeypatch.setattr("loratools.ops.unmerge.Undoing", partial(Undoing, block=block))
        unmerge(tmp_path / "merged", tmp_path / f"again{block}", threads=1)
        assert_same_files(base, tmp_path / f"again{block}")


def test_segments_of_a_larger_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratools.inverse.SEGMENT", 1000)
    tensors = network(torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", tensors, llama_config())
    roundtrip(tmp_path, base, adapter(tmp_path / "adapter", tensors, 1e-2, dora=True))


def test_the_same_record_for_any_number_of_threads(tmp_path: Path) -> None:
    tensors = network(torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(), shards=2)
    given = adapter(tmp_path / "adapter", tensors, 1e-2, dora=True)
    for threads in (1, 2):
        merge(base, given, tmp_path / f"merged{threads}", reversible=True, threads=threads)
    one, two = (record_path(tmp_path / f"merged{threads}", folder=True).read_bytes() for threads in (1, 2))
    assert one == two


def test_another_processor(tmp_path: Path) -> None:
    """torch without its vector instructions, and MKL on its oldest path: other kernels, which sum in other orders."""
    here = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "MKL_CBWR": "COMPATIBLE"}
    undo = "import sys, torch; from loratools import unmerge; print(torch.backends.cpu.get_cpu_capability())\n"
    undo += "for line in sys.argv[1:]: unmerge(line + '/merged', line + '/again', threads=1)"
    places = []
    for name, dtype in DTYPES.items():
        for dora in (False, True):
            place = tmp_path / f"{name}-{dora}"
            tensors = network(dtype, rows=100, columns=333)
            base = write_checkpoint(place / "base", tensors, llama_config())
            merge(base, adapter(place / "adapter", tensors, 1e-2, dora=dora, rank=16), place / "merged", reversible=True, threads=2)
            places.append(place)
    done = subprocess.run([sys.executable, "-c", undo, *map(str, places)], env=here, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "DEFAULT\n")
    for place in places:
        assert_same_files(place / "base", place / "again")


# -- size


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", DTYPES)
def test_the_record_of_an_ordinary_change_is_small(tmp_path: Path, name: str, dora: bool) -> None:
    """‖W′ − W‖ at 1 % of ‖W‖ and DoRA's factors within 1 % of 1: at most 2 % of the base, on 1.6 million weights."""
    tensors = {key: W for key, W in network(DTYPES[name], rows=640, columns=832).items() if "layers" in key}
    base = write_checkpoint(tmp_path / "base", tensors, llama_config())
    weights = sum(W.numel() for W in tensors.values())
    # a LoRA of 0.8 % and factors of 0.58 % together are 1 %
    receipt = merge(base, adapter(tmp_path / "adapter", tensors, 0.8e-2 if dora else 1e-2, dora=dora), tmp_path / "merged", reversible=True)
    norms = [row["relative_norm"] for row in receipt["tensors"]]
    assert weights > 1_000_000 and 0.009 < np.mean(norms) < 0.0102
    record = record_path(tmp_path / "merged", folder=True).stat().st_size
    assert receipt["unmerge"] == {"path": "unmerge.safetensors", "bytes": record, "share": receipt["unmerge"]["share"], "whole": []}
    assert receipt["unmerge"]["share"] == record / (base / "model.safetensors").stat().st_size <= 0.02
    unmerge(tmp_path / "merged", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


# -- what changed since


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a base, an adapter and their reversible merge, of a few hundred weights."""
    tensors = {key: W for key, W in network(torch.bfloat16, rows=6, columns=10).items() if "layers" in key}
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(), shards=2)
    (base / "tokenizer.json").write_text("{}")
    merge(base, adapter(tmp_path / "adapter", tensors, 1e-2, dora=True), tmp_path / "merged", reversible=True)
    return tmp_path


def flips(path: Path, count: int) -> list[tuple[int, int]]:
    """Bits of a file, as (byte, bit): so many, spread over it, none left out for ever."""
    size = path.stat().st_size
    places = np.unique(np.random.default_rng(size).integers(0, size, count))
    return [(int(place), int(place) % 8) for place in places]


@pytest.mark.parametrize(
    "name",
    [
        "merged/model-00001-of-00002.safetensors", "merged/model-00002-of-00002.safetensors", "merged/unmerge.safetensors",
        "merged/tokenizer.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
    ],
)  # fmt: skip
def test_a_changed_bit_is_noticed(small: Path, name: str) -> None:
    path = small / name
    data = path.read_bytes()
    for place, bit in flips(path, 60):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        with pytest.raises(LoratoolsError):
            unmerge(small / "merged", small / "again")
        assert sorted(item.name for item in small.iterdir()) == ["adapter", "base", "merged"], (place, bit)
    path.write_bytes(data)
    unmerge(small / "merged", small / "again")


def test_the_error_names_the_tensor(small: Path) -> None:
    path = small / "merged" / "model-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    last = list(Checkpoint(small / "merged").files["model-00001-of-00002.safetensors"])[-1]
    with pytest.raises(FormatError, match=rf"{last}: not the bytes that the merge wrote: found [0-9a-f]{{16}}…, expected") as caught:
        unmerge(small / "merged", small / "again")
    assert caught.value.tensor == last
    faults = verify(small / "merged")["faults"]
    assert len(faults) == 2 and last in faults[0]


def test_verify_knows_the_record(small: Path) -> None:
    assert verify(small / "merged", base=small / "base", adapters=small / "adapter")["faults"] == []
    path = small / "merged" / "unmerge.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert verify(small / "merged")["faults"] == [f"{path}: not the bytes that were written"]
    path.unlink()
    assert verify(small / "merged")["faults"] == [f"{path}: the receipt has it, the output lacks it"]
    with pytest.raises(FormatError, match="no record to undo a merge by; merge with --reversible, or give --approximate"):
        unmerge(small / "merged", small / "again")


def test_a_record_of_another_merge(small: Path) -> None:
    merge(small / "base", f"{small / 'adapter'}:0.5", small / "other", reversible=True)
    shutil.copy(small / "other" / "unmerge.safetensors", small / "merged" / "unmerge.safetensors")
    with pytest.raises(FormatError, match="not the bytes that the merge wrote"):
        unmerge(small / "merged", small / "again")


def test_a_record_that_would_write_elsewhere(small: Path) -> None:
    """Its digests can be right for all that: who makes a record makes them, too."""
    made = Record(small / "merged" / "unmerge.safetensors")
    beside = [{"beside": [{"path": path}]} for path in ("../../tokenizer.json", "/tmp/x")]
    for bad in (*beside, {"restored": ["file/../../config.json"]}):
        spool = Spool(small)
        for name in made.table["blobs"]:
            spool.put(name, [made.blob(name).read()])
        (small / "merged" / "unmerge.safetensors").unlink()
        spool.write(small / "merged" / "unmerge.safetensors", made.table | bad)
        with pytest.raises(FormatError, match="a file's name that leads out of its folder"):
            unmerge(small / "merged", small / "again")


# -- the adapters


def test_an_adapter_is_not_overwritten_by_what_it_is_taken_off(small: Path) -> None:
    with pytest.raises(LoratoolsError, match="is, holds or lies inside the input"):
        unmerge(small / "merged", small / "adapter", overwrite=True)
    assert (small / "adapter" / "adapter_model.safetensors").is_file()


def test_the_adapter_is_found_or_given(small: Path) -> None:
    (small / "adapter").rename(small / "moved")
    with pytest.raises(MatchError, match="is not where it was; give the adapter as it was merged with --adapter"):
        unmerge(small / "merged", small / "again")
    unmerge(small / "merged", small / "again", adapters=small / "moved")
    assert_same_files(small / "base", small / "again")


def test_another_adapter_is_refused(small: Path) -> None:
    tensors = read_checkpoint(small / "base")
    wrong = adapter(small / "wrong", tensors, 1e-2, dora=True, seed=5)
    with pytest.raises(MatchError, match=rf"wrong: not an adapter that was merged: expected {small / 'adapter'}"):
        unmerge(small / "merged", small / "again", adapters=wrong)
    shutil.rmtree(small / "adapter")
    with pytest.raises(MatchError, match="is not where it was"):
        unmerge(small / "merged", small / "again", adapters=wrong)
    wrong.rename(small / "adapter")
    with pytest.raises(MatchError, match=r"not the adapter that was merged: found other bytes in .*adapter_model\.safetensors"):
        unmerge(small / "merged", small / "again")


def test_an_adapter_in_memory_could_not_be_found_again(small: Path) -> None:
    held = load(small / "adapter")
    loose = type(held)(deltas=held.deltas)
    with pytest.raises(OptionError, match="--reversible needs adapters that are files"):
        merge(small / "base", loose, small / "out", reversible=True)


def test_a_kind_that_other_machines_may_compute_otherwise(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is undone all the same, from W′ alone."""
    monkeypatch.setattr(LowRank, "reproducible", False)
    merge(small / "base", small / "adapter", small / "out", reversible=True)
    monkeypatch.setattr(LowRank, "bind_dense", None)
    unmerge(small / "out", small / "again")
    assert_same_files(small / "base", small / "again")


# -- one step of several


def test_a_merge_onto_a_merge_unwinds_step_by_step(small: Path) -> None:
    tensors = read_checkpoint(small / "base")
    second = adapter(small / "second", tensors, 1e-2, seed=9)
    merge(small / "merged", second, small / "twice", reversible=True)
    undone = unmerge(small / "twice", small / "once")
    assert "the receipt beside it is the one that it had before" in undone["notes"]
    assert {path.name for path in (small / "once").iterdir()} == {path.name for path in (small / "merged").iterdir()}
    for path in (small / "merged").iterdir():
        assert (small / "once" / path.name).read_bytes() == path.read_bytes(), path.name
    assert verify(small / "once")["faults"] == []
    unmerge(small / "once", small / "again")
    assert_same_files(small / "base", small / "again")


def test_a_record_that_no_longer_fits_is_left_out(small: Path) -> None:
    tensors = read_checkpoint(small / "base")
    receipt = merge(small / "merged", adapter(small / "second", tensors, 1e-2, seed=9), small / "twice")
    assert [(entry["name"], "--reversible" in entry["reason"]) for entry in receipt["left_out"]] == [("unmerge.safetensors", True)]
    assert not (small / "twice" / "unmerge.safetensors").exists()


def test_what_the_merge_left_out_is_said(tmp_path: Path) -> None:
    tensors = network(torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", tensors, llama_config())
    (base / "pytorch_model.bin").write_bytes(b"old")
    merge(base, adapter(tmp_path / "adapter", tensors, 1e-2), tmp_path / "merged", reversible=True)
    notes = unmerge(tmp_path / "merged", tmp_path / "again")["notes"]
    assert notes == ["not given back, the merge left it out: pytorch_model.bin"]


# -- without a record


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_subtracting_is_as_near_as_it_says(tmp_path: Path, name: str, strength: float) -> None:
    tensors = network(DTYPES[name])
    base = write_checkpoint(tmp_path / "base", tensors, llama_config())
    given = f"{adapter(tmp_path / 'adapter', tensors, 0.3)}:{strength}"
    merge(base, given, tmp_path / "merged")
    receipt = unmerge(tmp_path / "merged", tmp_path / "near", adapters=given, approximate=True)
    SCHEMA.validate(receipt)
    near = read_checkpoint(tmp_path / "near")
    bounds = {row["name"]: row["off_by"] for row in receipt["tensors"]}
    assert len(bounds) == 3 and receipt["applied"] == 3
    for key, W in tensors.items():
        off = float((near[key].double() - W.double()).abs().max())
        assert off <= bounds.get(key, 0.0)
        if key in bounds and name != "fp64":
            assert off > bounds[key] / 10  # half a unit of the largest weights is not a bound of another order
    assert f"{max(bounds.values()):.3g}" in receipt["notes"][-1]
    assert verify(tmp_path / "near")["faults"] == []


def test_what_cannot_be_subtracted_is_refused(tmp_path: Path) -> None:
    tensors = network(torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", tensors, llama_config())
    dora = adapter(tmp_path / "dora", tensors, 1e-2, dora=True)
    saved = peft_config(target_modules=["none"], modules_to_save=["norm"])
    norm = write_adapter(tmp_path / "norm", {f"{ROOT}model.norm.weight": torch.zeros(160)}, saved)
    merge(base, dora, tmp_path / "merged")
    with pytest.raises(NotInvertible, match=r"a DoRA delta cannot be taken off by subtracting: found changes of 3 tensors .* --reversible"):
        unmerge(tmp_path / "merged", tmp_path / "near", adapters=dora, approximate=True)
    with pytest.raises(NotInvertible, match=r"model\.norm\.weight: a replacement delta cannot be taken off"):
        unmerge(tmp_path / "merged", tmp_path / "near", adapters=norm, approximate=True)
    with pytest.raises(OptionError, match="--approximate needs the adapters"):
        unmerge(tmp_path / "merged", tmp_path / "near", approximate=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "dora", "merged", "norm"]
