"""Bad inputs, each through the command line: exit code 1, a line that names file and tensor, nothing at OUT, nothing left behind.

Every case spoils one thing of a pair that merges (the first test); the inputs stay as they are, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools.cli import run
from tests.spoil import (
    BASE,
    CONFIG,
    FACTORS,
    FIRST,
    INDEX,
    PICKLE,
    ROOT,
    SECOND,
    A,
    B,
    Evil,
    Pair,
    Q,
    adapter_as,
    adapter_in_the_bases_place,
    another_model,
    base_config,
    behind_the_index,
    config,
    cut,
    cut_pickle,
    entry,
    factor,
    grouped_convolution,
    instead,
    link_loop,
    magnitude,
    moved,
    no_pickle,
    old_pickle,
    one_stray_pair,
    only_strangers,
    option,
    other_embedding,
    out,
    pipe,
    pipeline,
    put,
    quantised,
    rank_nought,
    rewire,
    swapped,
    tensor,
    then,
    tied_head,
    tuned,
    two_in_one_file,
    two_models,
    weight,
    words,
)

U8 = torch.zeros(8, dtype=torch.uint8)
LARGE, NAN = torch.full((2, 8), 1e6), torch.full((8, 8), torch.nan)
Case = tuple[str, Callable[[Pair], Any], tuple[str, ...]]

FILES: list[Case] = [
    ("an empty file", cut(BASE, 0), (BASE, "shorter than the 8 bytes", "0 bytes")),
    ("seven bytes", cut(BASE, 7), (BASE, "shorter than the 8 bytes")),
    ("sixteen bytes", put(BASE, bytes(16)), (BASE, "does not begin with '{'")),
    ("cut within the header", cut(BASE, 100), (BASE, "truncated: the header goes past the end")),
    ("cut within the data", cut(BASE, -1000), (BASE, "truncated: the file ends before its tensors do")),
    ("cut by one byte", cut(BASE, -1), (BASE, "truncated: the file ends before its tensors do")),
    ("one byte too many", lambda pair: pair.write(BASE, pair.weights.read_bytes() + b"0"), (BASE, "bytes after the last tensor")),
    ("the adapter cut", cut(FACTORS, -5), (FACTORS, "truncated")),
    ("a header of no bytes", put(BASE, bytes(8)), (BASE, "does not begin")),
    ("a header of 2**63 bytes", put(BASE, struct.pack("<Q", 1 << 63) + b"{}"), (BASE, "no header's length at its start")),
    ("a header longer than the file", put(BASE, struct.pack("<Q", 1 << 20) + b"{}"), (BASE, "past the end of the file")),
    ("a header that is not JSON", put(BASE, struct.pack("<Q", 8) + b'{"a": ,}'), (BASE, "not JSON")),
    ("a page of HTML", put(BASE, b"<!DOCTYPE html><html>404 not found</html>"), (BASE, "not a safetensors file", "<!DOCTYP")),
    ("a pointer of Git LFS", put(BASE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), (BASE, "run git lfs pull")),
    ("a pickle named safetensors", put(BASE, pickle.dumps({})), (BASE, "not a safetensors file")),
    ("a name twice", put(BASE, struct.pack("<Q", 16) + b'{"a": 1, "a": 2}'), (BASE, "a: the header names something twice")),
    ("an unknown dtype", entry(Q, dtype="F33"), (BASE, Q, "unknown dtype", "F33")),
    ("a negative size", entry(Q, shape=[-8, -8]), (BASE, Q, "natural numbers")),
    ("a size that is true", entry(Q, shape=[True, 64]), (BASE, Q, "natural numbers")),
    ("a size that is a fraction", entry(Q, shape=[8.0, 8.0]), (BASE, Q, "natural numbers")),
    ("a shape that overflows", entry(Q, shape=[1 << 59, 1 << 59]), (BASE, Q, "more elements than a file can hold")),
    ("offsets the wrong way round", entry(Q, data_offsets=[256, 0]), (BASE, Q, "do not fit")),
    ("offsets that do not fit the shape", entry(Q, shape=[8, 7]), (BASE, Q, "do not fit", "256 bytes", "224")),
    ("tensors that overlap", entry(Q, data_offsets=[0, 256]), (BASE, "hole or overlap")),
    ("a hole", lambda pair: pair.header(lambda table: table.pop(Q)), (BASE, "hole or overlap")),
    ("metadata that is no text", entry("__metadata__", format=1), (BASE, "strings to strings")),
    ("a pipe in the file's place", lambda pair: pipe(pair.weights), (BASE, "not a file", "a pipe")),
    ("links in a circle", lambda pair: link_loop(pair.weights), (BASE, "cannot be read", "symbolic links")),
    ("a folder in the adapter's place", lambda pair: (pair.factors.unlink(), pair.factors.mkdir()), ("adapter: no adapter in it",)),
]
FOLDERS: list[Case] = [
    ("no base", moved("base", "gone"), ("base: no such file or folder",)),
    ("no adapter", moved("adapter", "gone"), ("adapter: no such",)),
    ("an empty base", lambda pair: pair.weights.unlink(), ("base: no weights in it", "model.safetensors")),
    ("an adapter where the base is", adapter_in_the_bases_place, ("base: an adapter, where a model was expected",)),
    ("the adapter's file as base", instead(base=FACTORS), (FACTORS, "none of the adapter's 4 weights is in the base")),
    ("the base as adapter", instead(adapter="base"), ("base: no adapter in it", "a model rather than an adapter")),
    ("the base's file as adapter", instead(adapter=BASE), (BASE, "no format that loratools reads", "lm_head.weight")),
    ("a pipeline that lists nothing", pipeline, ("base: a pipeline none of whose folders holds weights",)),
    ("several models", two_models, ("base: holds several models", "one.safetensors, two.safetensors")),
    ("two models of two libraries", put("base/diffusion_pytorch_model.safetensors", b""), ("base: holds several models",)),
    ("only weights of another kind", moved(BASE, "base/tf_model.h5"), ("base: no model of safetensors or torch", "tf_model.h5")),
    ("a base pickle with code", lambda pair: pair.pickled_base({Q: Evil()}), ("pytorch_model.bin: ", "in it was run", "posix.mkdir")),
    ("a base pickle of other things", lambda pair: pair.pickled_base({Q: 1}), ("pytorch_model.bin: " + Q, "not a tensor", "int")),
    ("safetensors under a pickle's name", moved(BASE, "base/pytorch_model.bin"), ("pytorch_model.bin: not a torch file", "was run")),
    ("adapters in folders", then(moved("adapter", "all/style"), instead(adapter="all")), ("all: holds adapters", "style")),
    ("a sharded adapter", moved(FACTORS, f"{FACTORS}.index.json"), ("adapter: a sharded adapter",)),
    ("a config of the base that is not JSON", put("base/config.json", b"{"), ("base/config.json", "not readable as JSON")),
    ("a receipt of the base that is none", put("base/loratools.json", b'{"history": 5}'), ("base/loratools.json", "not a receipt")),
    ("a shard above the folder", rewire(Q, "../model.safetensors"), (INDEX, Q, "plain file name", "../model.safetensors")),
    ("a shard at an absolute path", rewire(Q, "/etc/passwd"), (INDEX, Q, "plain file name", "/etc/passwd")),
    ("a shard in a folder", rewire(Q, "sub/model.safetensors"), (INDEX, Q, "plain file name")),
    ("a shard without a name", rewire(Q, ""), (INDEX, Q, "plain file name")),
    ("a shard of a strange name", rewire(Q, "a\0b"), ("base/a\\x00b", Q, "missing")),
    ("a missing shard", then(Pair.sharded, moved(f"base/{SECOND}", "gone")), (SECOND, "a shard is missing")),
    ("a tensor in another shard", rewire("lm_head.weight", FIRST), (INDEX, "lm_head.weight", "not where the index says", SECOND)),
    ("a tensor in no shard", rewire("ghost.weight", FIRST), (INDEX, "ghost.weight", "in no shard")),
    ("a tensor in two shards", behind_the_index(**{"model.embed_tokens.weight": U8}), ("base", "model.embed_tokens.weight", "two shards")),
    ("a tensor the index lacks", behind_the_index(ghost=U8), (SECOND, "ghost", "the index does not list it")),
    ("an index without a map", lambda pair: pair.sharded(lambda index: index.pop("weight_map")), (INDEX, "weight_map")),
    ("an index with an odd map", lambda pair: pair.sharded(lambda index: index.update(weight_map={"a": 1})), (INDEX, "weight_map")),
    ("an index with odd metadata", lambda pair: pair.sharded(lambda index: index.update(metadata=[1])), (INDEX, "metadata")),
    ("an index that is a list", then(Pair.sharded, put(INDEX, b"[]")), (INDEX, "not a JSON object")),
    ("an index that is not JSON", then(Pair.sharded, put(INDEX, b"{")), (INDEX, "not readable as JSON")),
    ("a shard cut", then(Pair.sharded, cut(f"base/{SECOND}", 20)), (SECOND, "truncated")),
]
TENSORS: list[Case] = [
    ("no module in the base", only_strangers, ("adapter", "attention.q_proj", "none of the adapter's 4 weights is in the base")),
    ("one stray pair", one_stray_pair, (FACTORS, Q.replace("1", "7"), "no such weight", "nearest")),
    ("one stray tensor", tensor(ROOT + "0.mystery", torch.ones(3)), (FACTORS, ROOT + "0.mystery", "neither a tensor of the method")),
    ("a weight nobody saved", tensor(ROOT + "0.mlp.up_proj.weight", U8), (FACTORS, "mlp.up_proj.weight", "neither a tensor of the method")),
    ("half a pair", factor(lora_B__weight=...), (FACTORS, A, "has no lora_B")),
    ("the other half", factor(lora_A__weight=...), (FACTORS, B, "has no lora_A")),
    ("A and B swapped", swapped, (FACTORS, A, "found 8, expected 2", "swapped")),
    ("A and B that do not meet", factor(lora_B__weight=torch.ones(8, 3)), (FACTORS, A, "do not meet", "[8, 3]")),
    ("another rank than the config's", config(r=4), (FACTORS, "lora_A.weight", "found 2, expected 4")),
    ("rank 0", rank_nought, (FACTORS, A, "rank 0")),
    ("a vector as factor", factor(lora_A__weight=torch.ones(8)), (FACTORS, A, "not a LoRA pair")),
    ("whole numbers as factor", factor(lora_A__weight=torch.ones(2, 8, dtype=torch.int32)), (FACTORS, Q, "found I32")),
    ("complex factors", factor(lora_B__weight=torch.ones(8, 2, dtype=torch.complex64)), (FACTORS, Q, "found C64")),
    ("factors for another width", factor(lora_A__weight=torch.ones(2, 9)), (FACTORS, Q, "does not fit", "[8, 9]", "[8, 8]")),
    ("another model's base", another_model, (FACTORS, Q, "does not fit")),
    ("another model's embedding", other_embedding, (FACTORS, "model.embed_tokens.weight", "[17, 9]", "[17, 8]")),
    ("a grouped convolution", grouped_convolution, (FACTORS, B, "grouped convolution")),
    ("a linear pair on a convolution", weight(Q, torch.ones(8, 8, 3)), (FACTORS, Q, "does not fit")),
    ("a base of whole numbers", weight(Q, torch.ones(8, 8, dtype=torch.int64)), (FACTORS, Q, "found I64")),
    ("two adapters in one file", two_in_one_file, (FACTORS, "several adapters", "one, two")),
    ("mixed prefixes", then(tensor(A, ...), tensor(A[17:], torch.ones(2, 8))), (FACTORS, ": " + A[17:], "lacks the prefix")),
    ("one tensor twice", factor(lora_A__default__weight=torch.ones(2, 8)), (FACTORS, "lora_A.default.weight", "twice under two spellings")),
    ("a live state dict", tensor(ROOT + "0.original_module.weight", torch.ones(2, 8)), (FACTORS, "original_module", "live state dict")),
    ("a marker nobody writes", factor(lora_A__bias=torch.ones(2)), (FACTORS, "lora_A.bias", "not a key peft writes")),
    ("a bias without lora_bias", factor(lora_B__bias=torch.ones(8)), (FACTORS, "lora_B.bias", "without lora_bias")),
    ("a bias of the wrong size", then(config(lora_bias=True), factor(lora_B__bias=torch.ones(7))), (FACTORS, "lora_B.bias", "[7]")),
    ("a module outside the targets", config(target_modules=["v_proj"]), (FACTORS, "q_proj.lora_A.weight", "does not target this module")),
    ("a target without tensors", factor(lora_A__weight=..., lora_B__weight=...), (FACTORS, Q, "its file holds nothing for it")),
    ("no tensors at all", lambda pair: save_file({}, pair.factors), (FACTORS, "no tensors")),
    ("DoRA without magnitudes", config(use_dora=True), (FACTORS, "q_proj", "no lora_magnitude_vector")),
    ("a magnitude without DoRA", factor(lora_magnitude_vector=torch.ones(8)), (FACTORS, "lora_magnitude_vector", "without use_dora")),
    ("a magnitude of the wrong size", magnitude(7), (FACTORS, "lora_magnitude_vector", "found [7], expected [8]")),
    ("a magnitude with two axes", magnitude(8, 1), (FACTORS, "lora_magnitude_vector", "found [8, 1], expected [8]")),
    ("infinity in a factor", factor(lora_A__weight=torch.full((2, 8), torch.inf)), (f"{FACTORS}: {Q}", "inf or nan")),
    ("nan in a factor", factor(lora_B__weight=torch.full((8, 2), torch.nan)), (f"{FACTORS}: {Q}", "inf or nan")),
    ("nan in a weight that changes", weight(Q, NAN), ("base: " + Q, "not be finite in float32", "found nan")),
    ("too large for float16", then(factor(lora_A__weight=LARGE), option("--dtype", "float16")), ("base: " + Q, "float16", "65504")),
    ("a norm too large", then(weight("model.norm.weight", LARGE[0]), option("--dtype", "fp16")), ("base: model.norm", "float16")),
    ("a pickle with code", lambda pair: pair.pickled({A: Evil()}), (PICKLE, "nothing in it was run", "posix.mkdir")),
    ("an old pickle with code", old_pickle, (PICKLE, "nothing in it was run", "posix.mkdir")),
    ("a pickle that is a list", lambda pair: pair.pickled([torch.ones(2)]), (PICKLE, "not a dictionary", "list")),
    ("a pickle of other things", lambda pair: pair.pickled({A: torch.ones(2, 8), "epoch": 3}), (PICKLE, "epoch", "not a tensor", "int")),
    ("a pickle under numbers", lambda pair: pair.pickled({7: torch.ones(2, 8)}), (PICKLE, "7: not a tensor under a name", "Tensor")),
    ("a pickle cut", cut_pickle, (PICKLE, "truncated")),
    ("no pickle", no_pickle, (PICKLE, "not a torch file")),
]
SETTINGS: list[Case] = [
    ("no config", lambda pair: (pair.adapter / "adapter_config.json").unlink(), (FACTORS, "without an adapter_config.json")),
    ("a config that is not JSON", put(CONFIG, b"r: 8"), (CONFIG, "not readable as JSON")),
    ("a config that is a list", put(CONFIG, b"[]"), (CONFIG, "not a JSON object")),
    ("a config that is no text", put(CONFIG, b"\xff\xfe{"), (CONFIG, "not readable as JSON")),
    ("a config nested too deep", put(CONFIG, b'{"a":' * 100_000), (CONFIG, "not readable as JSON")),
    ("another method", config(peft_type="LOHA"), (FACTORS, "LOHA")),
    ("no method", config(peft_type=...), (FACTORS, "peft_type")),
    ("no alpha", config(lora_alpha=...), (FACTORS, "lora_alpha is missing", "--alpha-in")),
    ("alpha as text", config(lora_alpha="16"), (FACTORS, "lora_alpha", "'16'")),
    ("alpha nan", config(lora_alpha=float("nan")), (FACTORS, "lora_alpha", "nan")),
    ("alpha infinite", config(lora_alpha=float("inf")), (FACTORS, "lora_alpha", "inf")),
    ("alpha true", config(lora_alpha=True), (FACTORS, "lora_alpha", "True")),
    ("a rank that is a fraction", config(r=2.0), (FACTORS, "adapter_config.json: r", "2.0")),
    ("a rank of 0 in the config", config(r=0), (FACTORS, "adapter_config.json: r", "0")),
    ("a flag that is text", config(use_rslora="yes"), (FACTORS, "use_rslora", "'yes'")),
    ("an unknown field", config(use_shiny=True), (FACTORS, "use_shiny", "does not know")),
    ("an invalid pattern", config(rank_pattern={"q_proj(": 2}), (FACTORS, "rank_pattern", "q_proj(", "not a regular expression")),
    ("an invalid target", config(target_modules="(q_proj"), (FACTORS, "target_modules", "not a regular expression")),
    ("a pattern of no rank", config(rank_pattern={"q_proj": -1}), (FACTORS, "rank_pattern")),
    ("an unknown bias", config(bias="some"), (FACTORS, "bias", "'some'")),
    ("DoRA and a bias", config(use_dora=True, lora_bias=True), (FACTORS, "use_dora and lora_bias exclude each other")),
    ("pissa", config(init_lora_weights="pissa"), ("_proj.weight", "did not come from what pissa moves", "--initial")),
    ("olora", config(init_lora_weights="olora"), ("_proj.weight", "did not come from what olora moves", "--initial")),
    ("qalora", config(use_qalora=True), (FACTORS, "qalora_group_size")),
    ("block-diagonal", config(use_bdlora={"nblocks": 2}), (FACTORS, "use_bdlora")),
    ("activated by tokens", config(alora_invocation_tokens=[1, 2]), (FACTORS, "alora_invocation_tokens")),
    ("routed", config(arrow_config={"top_k": 1}), (FACTORS, "arrow_config")),
    ("layers replicated", config(layer_replication=[[0, 2], [1, 2]]), (FACTORS, "layer_replication")),
    ("fused slices", config(enable_lora=[True, False, True]), (FACTORS, "q_proj.lora_A.weight", "not the factors of a merged layer")),
]
QUANTISED: list[Case] = [
    ("by its config", base_config(quantization_config={"quant_method": "gptq"}), ("base: ", "quantised: found gptq")),
    ("by a nested config", base_config(text_config={"quantization_config": {"load_in_4bit": True}}), ("base: ", "found bitsandbytes")),
    ("bitsandbytes nf4", quantised({Q: U8, Q + ".quant_state.bitsandbytes__nf4": U8}), ("base: ", "bitsandbytes nf4")),
    ("bitsandbytes int8", quantised({Q: U8, Q[:-6] + "SCB": U8}), ("base: ", "bitsandbytes int8")),
    ("gptq or awq", quantised({Q[:-6] + "qweight": U8}), ("base: ", "gptq or awq")),
    ("mxfp4", quantised({"experts.up_blocks": U8, "experts.up_scales": U8}), ("base: ", "mxfp4")),
    ("fp8 in blocks", quantised({Q + "_scale_inv": torch.ones(1, 1)}), ("base: ", "fp8 with block scales")),
    ("compressed-tensors", quantised({Q[:-6] + "weight_packed": U8}), ("base: ", "compressed-tensors")),
    ("whole numbers with scales", quantised({Q: torch.ones(8, 8, dtype=torch.int8), Q + "_scale": U8}), ("base: ", "I8 with scales")),
    ("mlx", quantised({Q: torch.ones(8, 1, dtype=torch.uint32), Q[:-6] + "scales": torch.ones(8, 1)}), ("base: ", "mlx")),
    (
        "gptq to be dequantised",
        then(quantised({Q[:-6] + "qweight": U8}), option("--dequantize")),
        ("base: cannot be dequantised", "gptq or awq"),
    ),
    (
        "fp8 with a grid that does not fit",
        then(quantised({Q: torch.ones(8, 8).to(torch.float8_e4m3fn), Q + "_scale_inv": torch.ones(2, 2)}), option("--dequantize")),
        ("base: " + Q, "found [2, 2]", "[1, 1] for blocks of 128 × 128"),
    ),
    (
        "4 bits without a part",
        then(quantised({Q: U8, Q + ".quant_state.bitsandbytes__nf4": U8}), option("--dequantize")),
        ("base: " + Q, "not bitsandbytes' description"),
    ),
    (
        "fp8 too large for float16",
        then(
            quantised({Q: torch.full((8, 8), 448.0).to(torch.float8_e4m3fn), Q + "_scale_inv": torch.full((1, 1), 200.0)}),
            option("--dequantize", "--dtype", "float16"),
        ),
        ("base: " + Q, "would not be finite in float16", "found 89600"),
    ),
]
# what is said of words that no input could make right
USAGE = (("--dtype", "int4"), ("--rename", "OLD=NEW"), ("adapter:nan", "finite"), ("adapter:-inf", "finite"))
WORDS: list[Case] = [
    ("a tied head changed alone", tied_head, ("base: lm_head.weight", "one tensor in this model", "--untie")),
    ("a dtype nobody knows", option("--dtype", "int4"), ("--dtype", "int4")),
    ("a rename of nothing", option("--rename", "nothing=something"), ("adapter", "--rename changed no name")),
    ("a rename without =", option("--rename", "model"), ("--rename", "OLD=NEW")),
    ("a rename onto another", option("--rename", "q_proj=v_proj"), (FACTORS, "v_proj.weight", "two tensors meet")),
    ("a strength of nan", adapter_as(":nan"), ("adapter:nan", "finite")),
    ("an infinite strength", adapter_as(":-inf"), ("adapter:-inf", "finite")),
    ("a strength that is none", adapter_as(":half"), ("adapter:half: no such file",)),
    ("OUT exists", put("out", b"kept"), ("out: exists already", "--overwrite")),
    ("OUT is the base", out("base"), ("base: is, holds or lies inside the input",)),
    ("OUT in the base", out("base/merged"), ("base/merged: is, holds or lies inside the input",)),
    ("OUT is the adapter", out("adapter", "--overwrite"), ("adapter: is, holds or lies inside the input",)),
    ("OUT holds the inputs", out(".", "--overwrite"), ("is, holds or lies inside the input",)),
    ("OUT below a file", out("base.txt/out"), ("base.txt/out: lies below what is no folder", "base.txt")),
    ("OUT of too long a name", out("x" * 256), ("xxx: cannot be written", "too long")),
    ("one file asked to become a folder", instead(base=BASE), ("out", "OUT with the ending .safetensors")),
    ("inspect of a broken file", then(cut(FACTORS, -1), words("inspect", "{}/adapter")), (FACTORS, "truncated")),
    ("inspect of nothing", words("inspect", "{}/nothing"), ("nothing: no such file",)),
    ("inspect of a header that lies", then(entry(Q, shape=[8, 7]), words("inspect", "{}/base")), (BASE, Q, "do not fit")),
    ("extract, a tensor lacking", tuned(lambda table: table.pop("lm_head.weight")), ("lm_head.weight",)),
    ("extract, a tensor more", tuned(lambda table: table.update(ghost=torch.ones(2))), ("ghost",)),
    ("extract, another shape", tuned(lambda table: table.update({Q: torch.ones(8, 7)})), (Q, "[8, 7]")),
    ("extract, nan in the tuned", tuned(lambda table: table.update({Q: NAN})), (Q,)),
    ("extract, no room", tuned(dict, "--size", "10"), ("10",)),
    ("extract into the tuned", then(out("tuned/out"), tuned(dict)), ("tuned/out: is, holds",)),
]
CASES = FILES + FOLDERS + TENSORS + SETTINGS + [(f"quantised {name}", *rest) for name, *rest in QUANTISED] + WORDS


def every_file(folder: Path) -> dict[str, str]:
    """Digests of all that lies in a folder; of links and pipes, what they are."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else oct(path.lstat().st_mode)
        for path in paths
    }


def test_the_pair_that_is_spoilt_below_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = Pair(tmp_path)
    assert run(pair.command) == 0, capsys.readouterr().err
    receipt = json.loads((pair.out / "loratools.json").read_text())
    assert receipt["applied"] == receipt["expected"] == 4


@pytest.mark.parametrize(("spoil", "said"), [case[1:] for case in CASES], ids=[case[0].replace(" ", "-") for case in CASES])
def test_bad_input(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Pair], Any], said: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.txt").write_text("a file")
    pair = Pair(tmp_path)
    spoil(pair)
    before = every_file(tmp_path)
    code = run(pair.command)
    told = capfd.readouterr()
    assert (code, told.out) == (2 if said in USAGE else 1, ""), told.err
    lines = told.err.splitlines()
    assert lines
    assert all(line.startswith("Error: ") for line in lines)
    line = next((line for line in lines if all(part in line for part in said)), None)
    assert line, f"none says {said}:\n{told.err}"
    assert every_file(tmp_path) == before


def test_there_are_enough_of_them_and_no_two_alike() -> None:
    names = [name for name, *_ in CASES]
    assert len(set(names)) == len(names) >= 60
