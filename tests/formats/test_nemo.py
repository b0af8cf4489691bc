"""NeMo's and Megatron-Bridge's adapters: their forward in float64, every spelling of names, archives, what they cannot say."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.adapter import Adapter
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.errors import (
    AmbiguousError,
    FormatError,
    LoratoolsError,
    MatchError,
    NotExpressible,
    OptionError,
    ShapeError,
    UnsupportedError,
)
from loratools.formats import FORMATS, _archive
from loratools.formats.base import Container, ReadOptions
from loratools.formats.nemo import decode
from loratools.formats.nemo_encode import encode
from loratools.formats.nemo_files import run_config
from loratools.formats.opening import open_container
from loratools.tensors import read_tensor, to_ref
from tests.files import raw, write_checkpoint
from tests.spoil import Evil

HEADS, GROUPS, SIZE, HIDDEN, INNER, RANK = 4, 2, 4, 16, 24, 2
CONFIG = {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "hidden_size": HIDDEN}
MEGATRON = {"num_attention_heads": HEADS, "num_query_groups": GROUPS, "hidden_size": HIDDEN, "kv_channels": None}
NEMO = {**MEGATRON, "peft": {"peft_scheme": "lora", "lora_tuning": {"adapter_dim": RANK, "alpha": 3}}}
BRIDGE = {"model": MEGATRON, "peft": {"dim": RANK, "alpha": 3}}
Q, KV = HEADS * SIZE, GROUPS * SIZE
ROWS = {"q": Q, "k": KV, "v": KV, "qkv": Q + 2 * KV, "o": HIDDEN, "gate": INNER, "up": INNER, "fc1": 2 * INNER, "down": HIDDEN}
LEAVES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
# every spelling of every module, as the files have them
SPELLINGS = {
    "bridge": {
        "decoder.layers.1.self_attention.linear_qkv.adapter": "qkv",
        "decoder.layers.1.self_attention.linear_proj.adapter": "o",
        "decoder.layers.1.mlp.linear_fc1.adapter": "fc1",
        "decoder.layers.1.mlp.linear_fc2.adapter": "down",
    },
    "bridge canonical": {
        "module.decoder.layers.1.self_attention.linear_qkv.adapter.adapter_q": "q",
        "module.decoder.layers.1.self_attention.linear_qkv.adapter.adapter_k": "k",
        "module.decoder.layers.1.self_attention.linear_qkv.adapter.adapter_v": "v",
        "module.decoder.layers.1.self_attention.linear_proj.adapter": "o",
        "module.decoder.layers.1.mlp.linear_fc1.adapter.adapter_gate": "gate",
        "module.decoder.layers.1.mlp.linear_fc1.adapter.adapter_up": "up",
        "module.decoder.layers.1.mlp.linear_fc2.adapter": "down",
    },
    "nemo": {
        "model.decoder.layers.1.self_attention.adapter_layer.lora_kqv_adapter": "qkv",
        "model.decoder.layers.1.self_attention.adapter_layer.lora_dense_attention_adapter": "o",
        "model.decoder.layers.1.mlp.adapter_layer.lora_hto4h_adapter": "fc1",
        "model.decoder.layers.1.mlp.adapter_layer.lora_4htoh_adapter": "down",
    },
    "nemo canonical": {
        "model.module.decoder.layers.1.self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter": "q",
        "model.module.decoder.layers.1.self_attention.adapter_layer.lora_unfused_kqv_adapter.k_adapter": "k",
        "model.module.decoder.layers.1.self_attention.adapter_layer.lora_unfused_kqv_adapter.v_adapter": "v",
        "model.module.decoder.layers.1.self_attention.adapter_layer.lora_dense_attention_adapter": "o",
        "model.module.decoder.layers.1.mlp.adapter_layer.lora_unfused_hto4h_adapter.gate_adapter": "gate",
        "model.module.decoder.layers.1.mlp.adapter_layer.lora_unfused_hto4h_adapter.up_adapter": "up",
        "model.module.decoder.layers.1.mlp.adapter_layer.lora_4htoh_adapter": "down",
    },
    "before megatron-core": {
        "model.language_model.encoder.layers.1.self_attention.adapter_layer.lora_kqv_adapter": "qkv",
        "model.language_model.encoder.layers.1.self_attention.adapter_layer.lora_dense_attention_adapter": "o",
        "model.language_model.encoder.layers.1.mlp.adapter_layer.lora_hto4h_adapter": "fc1",
        "model.language_model.encoder.layers.1.mlp.adapter_layer.lora_4htoh_adapter": "down",
    },
}
FUSED = {"qkv": ("q", "k", "v"), "fc1": ("gate", "up")}


def state(spelling: str = "bridge", *, dora: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {}
    for module, what in SPELLINGS[spelling].items():
        into = INNER if what == "down" else HIDDEN
        found |= {f"{module}.linear_in.weight": torch.randn(RANK, into), f"{module}.linear_out.weight": torch.randn(ROWS[what], RANK)}
        if dora:
            found[f"{module}.weight_magnitude"] = torch.rand(ROWS[what]) + 1
    return found


def container(tensors: Mapping[str, Tensor], config: object = CONFIG, said: Mapping[str, Any] | None = None) -> Container:
    beside = {"run_config.yaml": BRIDGE} if said is None else said
    return Container({name: to_ref(tensor) for name, tensor in tensors.items()}, beside={**beside, "config.json": config or {}})


def slots(what: str, rows: Tensor) -> dict[str, Tensor]:
    """Rows of a fused output by what they are: Megatron's `_interleave_qkv` undone, and its `chunk` of gate and up."""
    if what == "fc1":
        return dict(zip(("gate", "up"), rows.chunk(2), strict=True))
    if what != "qkv":
        return {what: rows}
    grouped = rows.reshape(GROUPS, HEADS // GROUPS + 2, SIZE, *rows.shape[1:])
    parts = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
    return {slot: part.reshape(-1, *rows.shape[1:]) for slot, part in zip("qkv", parts, strict=True)}


def changes(tensors: Mapping[str, Tensor], spelling: str) -> dict[str, Tensor]:
    """ParallelLinearAdapter's forward, alpha/dim · linear_out(linear_in(x)), of the unit vectors, in float64."""
    found = {}
    for module, what in SPELLINGS[spelling].items():
        A, B = (tensors[f"{module}.{side}.weight"].double() for side in ("linear_in", "linear_out"))
        found |= slots(what, (torch.eye(A.shape[1], dtype=torch.float64) @ A.T @ B.T * (3 / RANK)).T)
    return found


def bytes_of(adapter: Adapter) -> dict[str, dict[str, bytes]]:
    return {name: {field: bytes(ref.read()) for field, ref in delta.refs().items()} for name, delta in adapter.items()}


def dense(delta: object) -> Tensor:
    assert isinstance(delta, LowRank)
    return delta.scaling * read_tensor(delta.B, torch.float64) @ read_tensor(delta.A, torch.float64)


@pytest.mark.parametrize("said", [{"run_config.yaml": BRIDGE}, {"model_config.yaml": NEMO}], ids=["bridge", "nemo"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_and_the_forward(spelling: str, said: Mapping[str, Any]) -> None:
    tensors = state(spelling)
    adapter = decode(container(tensors, said=said))
    want = {f"model.layers.1.{LEAVES[slot]}.weight": change for slot, change in changes(tensors, spelling).items()}
    assert set(adapter) == set(want) and len(want) == 7
    for name, change in want.items():
        torch.testing.assert_close(dense(adapter[name]), change)  # the same products of float64, summed in another order


@pytest.mark.parametrize("spelling", ["bridge", "nemo canonical"])
def test_weights_that_are_fused_in_transformers_too(spelling: str) -> None:
    """phi3 has q above k above v, and gate above up."""
    tensors = state(spelling)
    adapter, want = decode(container(tensors, {**CONFIG, "model_type": "phi3"})), changes(tensors, spelling)
    root = "model.layers.1"
    torch.testing.assert_close(dense(adapter[f"{root}.self_attn.qkv_proj.weight"]), torch.cat([want[slot] for slot in "qkv"]))
    torch.testing.assert_close(dense(adapter[f"{root}.mlp.gate_up_proj.weight"]), torch.cat([want["gate"], want["up"]]))


def test_a_magnitude_goes_with_its_rows() -> None:
    tensors = state(dora=True)
    adapter = decode(container(tensors))
    for module, what in SPELLINGS["bridge"].items():
        for slot, magnitude in slots(what, tensors[f"{module}.weight_magnitude"]).items():
            delta = adapter[f"model.layers.1.{LEAVES[slot]}.weight"]
            assert isinstance(delta, DoRA) and torch.equal(read_tensor(delta.magnitude).view(-1), magnitude)
    back = encode(adapter)  # rows and magnitudes where they were, byte for byte
    assert {key: bytes(ref.read()) for key, ref in back.tensors.items()} == {key: raw(tensor) for key, tensor in tensors.items()}
    assert back.beside["run_config.yaml"]["peft"]["_target_"] == "megatron.bridge.peft.dora.DoRA"
    assert back.beside["run_config.yaml"]["peft"]["target_modules"] == ["linear_qkv", "linear_fc1", "linear_proj", "linear_fc2"]
    assert bytes_of(decode(back)) == bytes_of(adapter)


def test_dora_that_it_cannot_say() -> None:
    fact = "DoRA on fused weights alone, whose slots share a factor"
    k, o = (f"model.layers.1.self_attn.{slot}_proj.weight" for slot in "ko")
    adapter = decode(container(state(dora=True)))
    other = replace(adapter[k], direction=replace(adapter[k].direction, A=to_ref(torch.ones(2, 16))))  # type: ignore[type-var, attr-defined]
    for deltas, said in (
        ({**adapter, k: other}, rf"k_proj\.weight: .*{fact}; convert --kind lora --base"),
        ({name: delta for name, delta in adapter.items() if name != k}, rf"q_proj\.weight: .*{fact}: found none of k_proj; convert"),
        ({**adapter, o: low()}, r"o_proj\.weight: Megatron-Bridge's DoRA is of all modules, and this is none; convert --kind dora"),
    ):
        with pytest.raises(NotExpressible, match=said):
            encode(replace(adapter, deltas=deltas))
    with pytest.raises(AmbiguousError, match=r"q_proj\.weight: where its rows lie depends on the model's heads"):
        encode(replace(adapter, model={"model_type": "llama"}))


def again(first: Adapter, tmp_path: Path) -> Adapter:
    loratools.save(first, tmp_path / "again", format="nemo")
    return loratools.load(tmp_path / "again")


@pytest.mark.parametrize("kind", ["llama", "phi3", "mixtral"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_written_and_read_again_it_is_the_same(tmp_path: Path, spelling: str, kind: str) -> None:
    tensors = {key: tensor for key, tensor in state(spelling).items() if kind != "mixtral" or ".mlp." not in key}
    first = decode(container(tensors, {**CONFIG, "model_type": kind}))
    assert set(bytes_of(first)) == {
        "llama": {f"model.layers.1.{leaf}.weight" for leaf in LEAVES.values()},
        "phi3": {f"model.layers.1.{leaf}_proj.weight" for leaf in ("self_attn.qkv", "self_attn.o", "mlp.gate_up", "mlp.down")},
        "mixtral": {f"model.layers.1.{LEAVES[slot]}.weight" for slot in "qkvo"},
    }[kind]
    assert bytes_of(again(first, tmp_path)) == bytes_of(first)


def test_what_is_written(tmp_path: Path) -> None:
    tensors = {key.removeprefix("module."): value for key, value in state("bridge canonical").items() if "adapter_k" not in key}
    again(decode(container(tensors)), tmp_path)
    written = load_file(tmp_path / "again/adapter_model.safetensors")
    assert set(written) == set(tensors) and all(torch.equal(written[key], value) for key, value in tensors.items())
    text = (tmp_path / "again/run_config.yaml").read_text()
    assert "  dim: 2\n  alpha: 3\n" in text and text.count("linear_k") == 1  # Megatron-Bridge makes k with q and v
    assert json.loads((tmp_path / "again/config.json").read_text()) == CONFIG
    assert run_config(2, 2.5, ["decoder.layers.0.mlp.linear_fc2.adapter"])["peft"]["target_modules"] == ["linear_fc2"]


# -- archives


def archive(path: Path, members: Mapping[str, bytes], mode: str = "w:") -> Path:
    with tarfile.open(path, mode) as made:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return path


def pickled(table: object, **how: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(table, stream, **how)
    return stream.getvalue()


YAML = b"""hidden_size: 16
num_attention_heads: 4
num_query_groups: 2
kv_channels: null
peft:
  peft_scheme: lora
  lora_tuning:
    target_modules:
    - all
    adapter_dim: 2
    alpha: 3
"""


def base(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(1)
    sizes = {slot: (ROWS[slot], INNER if slot == "down" else HIDDEN) for slot in LEAVES}
    tensors = {f"model.layers.1.{leaf}.weight": torch.randn(sizes[slot]) for slot, leaf in LEAVES.items()}
    return write_checkpoint(folder / "base", tensors, CONFIG), tensors


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_an_archive_merged_and_converted(tmp_path: Path, mode: str, legacy: bool) -> None:
    tensors = state("nemo")
    weights = pickled(tensors, _use_new_zipfile_serialization=not legacy)
    path = archive(tmp_path / "lora.nemo", {"./model_config.yaml": YAML, "./model_weights.ckpt": weights}, mode)
    assert [row.name for row in FORMATS if row.detect(open_container(path))] == ["nemo"]
    folder, W = base(tmp_path)
    receipt = loratools.merge(folder, path, tmp_path / "out")
    assert receipt["applied"] == receipt["expected"] == 7
    found = load_file(tmp_path / "out/model.safetensors")
    for slot, change in changes(tensors, "nemo").items():
        name = f"model.layers.1.{LEAVES[slot]}.weight"
        torch.testing.assert_close(found[name], (W[name].double() + change).float(), rtol=0, atol=1e-6)  # one rounding
    loratools.convert(path, tmp_path / "peft", format="peft", base=folder)
    assert bytes_of(loratools.load(tmp_path / "peft")) == bytes_of(decode(container(tensors)))


def test_an_unpacked_archive_and_a_state_dict_in_either_container(tmp_path: Path) -> None:
    tensors = state("nemo")
    (tmp_path / "model_weights.ckpt").write_bytes(pickled(tensors))
    (tmp_path / "model_config.yaml").write_bytes(YAML)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    want = bytes_of(decode(container(tensors)))
    first = loratools.load(tmp_path)
    assert bytes_of(first) == want and {path.name for path in first.files} == {"model_weights.ckpt", "model_config.yaml", "config.json"}
    save_file(tensors, tmp_path / "state.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "state.pt")
    assert bytes_of(loratools.load(tmp_path / "state.safetensors")) == bytes_of(loratools.load(tmp_path / "state.pt")) == want


def test_archives_that_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, path = pickled(state("nemo")), tmp_path / "lora.nemo"
    cases: list[tuple[Mapping[str, bytes], type[LoratoolsError], str]] = [
        ({"x": b""}, FormatError, r"no model_weights\.ckpt in it: found x"),
        ({}, FormatError, "found an empty archive"),
        ({"mp_rank_00/model_weights.ckpt": weights}, UnsupportedError, r"of several ranks.*to_tp1\.py"),
        ({"model_weights/metadata.json": b"{}"}, UnsupportedError, "distributed checkpoint.*export_adapter_ckpt"),
        ({"./model_weights.ckpt": weights, "model_weights.ckpt": weights}, FormatError, "a member that is there twice"),
        ({"model_weights.ckpt": weights, "model_config.yaml": b"\xff"}, FormatError, r"model_config\.yaml cannot be read"),
        ({"model_weights.ckpt": pickled({"x": Evil()})}, FormatError, "nothing in it was run: found posix.mkdir"),
    ]
    monkeypatch.chdir(tmp_path)
    for members, error, said in cases:
        with pytest.raises(error, match=said):
            loratools.load(archive(path, members))
    assert not (tmp_path / "code-in-the-pickle-ran").exists()
    path.write_bytes(archive(path, {"model_weights.ckpt": weights}).read_bytes()[:2000])
    with pytest.raises(FormatError, match=r"truncated"):
        loratools.load(path)
    os.mkfifo(tmp_path / "pipe.nemo")
    with pytest.raises(FormatError, match=r"not a tar archive, or a truncated one \(FileNotFoundError\)"):
        loratools.load(tmp_path / "pipe.nemo")
    path.write_bytes(b"no tar")
    with pytest.raises(FormatError, match=r"not a tar archive, or a truncated one \(ReadError\)"):
        loratools.load(path)
    monkeypatch.setattr(_archive, "LIMIT", 1000)
    with pytest.raises(UnsupportedError, match=r"too large to read in memory.*; unpack it, and give model_weights\.ckpt"):
        loratools.load(archive(path, {"model_weights.ckpt": weights}, "w:gz"))
    monkeypatch.setattr(_archive, "_TEXT", 10)
    with pytest.raises(FormatError, match=r"model_config\.yaml is no config: found \d+ bytes"):
        loratools.load(archive(path, {"model_weights.ckpt": weights, "model_config.yaml": YAML}))


def test_folders_that_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "one/mp_rank_01").mkdir(parents=True)
    (tmp_path / "one/mp_rank_01/model_weights.ckpt").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"of several ranks.*found mp_rank_01/model_weights\.ckpt"):
        loratools.load(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two/__0_0.distcp").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="distributed checkpoint of Megatron's"):
        loratools.load(tmp_path / "two")


# -- what it cannot tell, and what it cannot say


def test_what_nothing_tells() -> None:
    waiting = decode(container(state(), None))
    assert next(iter(waiting)) == "decoder.layers.1.self_attention.linear_qkv.adapter.weight"
    with pytest.raises(AmbiguousError, match="depends on the model, which nothing tells; give --base"):
        bytes_of(waiting)
    assert waiting.pending is not None and "model.layers.1.self_attn.q_proj.weight" in waiting.pending(CONFIG)
    with pytest.raises(AmbiguousError, match="nothing tells"):
        waiting.pending({})
    with pytest.raises(AmbiguousError, match=r"no alpha in the file.*--alpha-in"):
        decode(container(state(), said={}))
    told = decode(container(state(), said={}), ReadOptions(alpha=3))
    assert bytes_of(told) == bytes_of(decode(container(state())))
    headless = {"model_type": "llama"}
    with pytest.raises(AmbiguousError, match="where its rows lie depends on the model's heads"):
        decode(container(state(), headless, {}), ReadOptions(alpha=3))
    assert len(decode(container(state(), headless))) == 7  # Megatron's own config tells them


def test_alpha_is_the_rank_where_nemo_does_not_tell_it() -> None:
    said = {"model_config.yaml": {**MEGATRON, "peft": {"lora_tuning": {"adapter_dim": RANK}}}}
    low = decode(container(state("nemo"), said=said))["model.layers.1.self_attn.o_proj.weight"]
    assert isinstance(low, LowRank) and low.scaling == 1.0


FAULTS: dict[str, tuple[Mapping[str, Any], type[LoratoolsError], str]] = {
    "rank": ({"run_config.yaml": {"peft": {"dim": 8, "alpha": 3}}}, ShapeError, r"not that of run_config\.yaml: found 2, expected 8"),
    "dim": ({"run_config.yaml": {"peft": {"dim": "8", "alpha": 3}}}, FormatError, "peft: dim: found 8, expected a whole number"),
    "alpha": ({"run_config.yaml": {"peft": {"dim": 2, "alpha": True}}}, FormatError, "peft: alpha: found True, expected a number"),
    "heads": ({"run_config.yaml": {**BRIDGE, "model": {**MEGATRON, "num_query_groups": 4}}}, MatchError, "its heads.*are not the model's"),
    "no heads": ({"run_config.yaml": {**BRIDGE, "model": {"num_attention_heads": 3.5}}}, FormatError, "num_attention_heads: found 3.5"),
    "legacy": ({"model_config.yaml": {**NEMO, "megatron_legacy": True}}, UnsupportedError, "megatron_legacy"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_configs_that_do_not_fit(case: str) -> None:
    said, error, text = FAULTS[case]
    refused(container(state(), said=said), error, text)


def refused(found: Container, error: type[LoratoolsError], said: str) -> None:
    """The first of its faults is of that class, and says that."""
    with pytest.raises(LoratoolsError, match=said) as caught:
        decode(found)
    assert isinstance(getattr(caught.value, "errors", [caught.value])[0], error)


ONES = torch.ones(2, 2)
PROJ, QKV = "decoder.layers.1.self_attention.linear_proj.adapter", "decoder.layers.1.self_attention.linear_qkv.adapter"
OLDER = "model.decoder.layers.1.self_attention.adapter_layer.lora_dense_attention_adapter"
ROUTER = "decoder.layers.1.mlp.router.adapter"
MISFITS: dict[str, tuple[dict[str, Tensor], type[LoratoolsError], str]] = {
    "a weight": ({"decoder.layers.1.self_attention.linear_proj.weight": ONES}, FormatError, "not a tensor NeMo writes in a LoRA"),
    "experts": ({"decoder.layers.1.mlp.experts.linear_fc1.adapter.linear_in.weight": ONES}, UnsupportedError, "LoRA of experts"),
    "adapters": ({"model.decoder.layers.1.adapter_layer.adapter_1.linear_in.weight": ONES}, UnsupportedError, "no change of a weight"),
    "a half": ({"decoder.layers.2.mlp.linear_fc2.adapter.linear_in.weight": ONES}, FormatError, r"has no linear_out\.weight beside it"),
    "a router": (
        {f"{ROUTER}.linear_in.weight": ONES, f"{ROUTER}.linear_out.weight": ONES}, FormatError,
        "not a module that NeMo has LoRA on in a llama: expected decoder",
    ),
    "a stack": ({f"{PROJ}.linear_in.weight": torch.ones(2, 2, 16)}, ShapeError, "not a factor: found .2, 2, 16., expected .r, in."),
    "ranks": ({f"{PROJ}.linear_out.weight": torch.ones(16, 3)}, ShapeError, r"linear_proj\.adapter"),
    "heads": ({f"{QKV}.linear_out.weight": torch.ones(30, 2)}, ShapeError, "not the rows of q, k and v"),
    "a magnitude": ({f"{PROJ}.weight_magnitude": torch.ones(15)}, ShapeError, "a magnitude of another size than B"),
    "twice": (
        {f"{OLDER}.linear_in.weight": torch.ones(2, 16), f"{OLDER}.linear_out.weight": torch.ones(16, 2)}, FormatError,
        "two modules that are one in transformers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit(case: str) -> None:
    more, error, said = MISFITS[case]
    refused(container(state() | more), error, said)


def test_models_whose_names_are_not_known() -> None:
    refused(container(state(), {"model_type": "bert"}), FormatError, "how nemo names this model's modules is not known here: found bert")
    refused(container(state(), {**CONFIG, "model_type": "mixtral"}), FormatError, "not a module that NeMo has LoRA on in a moe")


def low(rank: int = 2, alpha: float = 4.0) -> LowRank:
    return LowRank(A=to_ref(torch.randn(rank, 16)), B=to_ref(torch.randn(16, rank)), alpha=alpha, layer="linear")


def test_what_it_cannot_say(tmp_path: Path) -> None:
    one, other = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    assert set(encode(Adapter({one: low()})).tensors) == {
        f"decoder.layers.0.self_attention.linear_qkv.adapter.adapter_q.linear_{side}.weight" for side in ("in", "out")
    }
    with pytest.raises(NotExpressible, match=r"one rank for all modules: .*; resize --rank"):
        encode(Adapter({one: low(), other: low(3, 6.0)}))
    with pytest.raises(NotExpressible, match=r"one alpha for all modules: .*; rescale --bake"):
        encode(Adapter({one: low(), other: low(alpha=5.0)}))
    with pytest.raises(NotExpressible, match="nemo has no LoRA on this tensor"):
        encode(Adapter({"model.layers.0.mlp.experts.0.w1.weight": low()}))
    with pytest.raises(OptionError, match="a folder of weights and a config"):
        loratools.save(Adapter({one: low()}), tmp_path / "out.nemo", format="nemo")
