"""torchtune's adapters: its converter's formulas in float64, rows of q and k, what it cannot say, from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import loratools
from loratools.adapter import Adapter
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, FormatError, NotExpressible
from loratools.formats import FORMATS
from loratools.formats.base import Container, ReadOptions, open_container
from loratools.formats.torchtune import decode, encode
from loratools.tensors import read_tensor, to_ref
from tests.files import write_checkpoint

CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
PEFT = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "peft_type": "LORA"}
SIZES = {"attn.q_proj": (16, 16), "attn.k_proj": (8, 16), "attn.v_proj": (8, 16), "attn.output_proj": (16, 16), "mlp.w1": (24, 16)}
NAMES = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj",
}  # fmt: skip


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {}
    for module, (out, into) in SIZES.items():
        found |= {f"layers.1.{module}.lora_a.weight": torch.randn(2, into), f"layers.1.{module}.lora_b.weight": torch.randn(out, 2)}
    return found


def container(tensors: dict[str, Tensor], model: object = CONFIG) -> Container:
    return Container({name: to_ref(tensor) for name, tensor in tensors.items()}, config=PEFT, beside={"config.json": model or {}})


def permuted(t: Tensor, heads: int) -> Tensor:
    """torchtune's rows as transformers has them: its `_permute` with the head's pairs brought half a head apart."""
    size = t.shape[0] // heads
    return t.view(heads, size // 2, 2, -1).transpose(1, 2).reshape(t.shape)


def bytes_of(adapter: Adapter) -> dict[str, dict[str, bytes]]:
    return {name: {field: bytes(ref.read()) for field, ref in delta.refs().items()} for name, delta in adapter.items()}


def test_names_and_rows() -> None:
    tensors = state()
    adapter = decode(container(tensors))
    for module, name in NAMES.items():
        low = adapter[f"model.layers.1.{name}.weight"]
        assert isinstance(low, LowRank) and low.scaling == 1.5
        B = tensors[f"layers.1.{module}.lora_b.weight"]
        B = permuted(B, {"attn.q_proj": 4, "attn.k_proj": 2}[module]) if module in ("attn.q_proj", "attn.k_proj") else B
        assert torch.equal(read_tensor(low.B), B)
        assert torch.equal(read_tensor(low.A), tensors[f"layers.1.{module}.lora_a.weight"])


def test_qwen_is_not_permuted_and_a_magnitude_goes_with_its_rows() -> None:
    tensors = state()
    plain = decode(container(tensors, {**CONFIG, "model_type": "qwen2"}))["model.layers.1.self_attn.q_proj.weight"]
    assert isinstance(plain, LowRank) and torch.equal(read_tensor(plain.B), tensors["layers.1.attn.q_proj.lora_b.weight"])
    tensors["layers.1.attn.q_proj.magnitude"] = torch.arange(16.0)
    dora = decode(container(tensors))["model.layers.1.self_attn.q_proj.weight"]
    assert isinstance(dora, DoRA)
    assert torch.equal(read_tensor(dora.magnitude).view(-1), permuted(torch.arange(16.0)[:, None], 4).view(-1))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_it_comes_back_bit_for_bit(kind: str) -> None:
    tensors = state()
    if kind == "phi3":  # torchtune's w1 is one half of a fused weight: with the other it is one change
        tensors |= {key.replace("w1", "w3"): value + 1 for key, value in state().items() if "w1" in key}
    first = decode(container(tensors, {**CONFIG, "model_type": kind}))
    back = encode(first)
    assert {name: bytes(ref.read()) for name, ref in back.tensors.items()} == {
        name: bytes(to_ref(tensor).read()) for name, tensor in tensors.items()
    }
    assert bytes_of(decode(Container(back.tensors, config=back.config, beside={"config.json": dict(first.model)}))) == bytes_of(first)


def test_what_nothing_tells() -> None:
    waiting = decode(container(state(), None))
    assert next(iter(waiting)) == "layers.1.attn.q_proj.weight"
    with pytest.raises(AmbiguousError, match="depends on the model, which nothing tells; give --base"):
        bytes_of(waiting)
    assert waiting.pending is not None and "model.layers.1.self_attn.q_proj.weight" in waiting.pending(CONFIG)
    with pytest.raises(AmbiguousError, match="nothing tells"):
        waiting.pending({})
    with pytest.raises(AmbiguousError, match="no alpha"):
        decode(Container({name: to_ref(tensor) for name, tensor in state().items()}))
    with pytest.raises(FormatError, match="not known here: found bert"):
        decode(container(state(), {"model_type": "bert"}))
    with pytest.raises(FormatError, match="not a tensor torchtune writes"):
        decode(container({**state(), "x.weight": torch.ones(1)}))
    lacking = state()
    del lacking["layers.1.mlp.w1.lora_b.weight"]
    with pytest.raises(FormatError, match=r"has no lora_b\.weight beside it"):
        decode(container(lacking))


def test_what_it_cannot_say() -> None:
    low = LowRank(A=to_ref(torch.randn(2, 16)), B=to_ref(torch.randn(16, 2)), alpha=4.0, layer="linear")
    with pytest.raises(NotExpressible, match="in several ways"):
        encode(Adapter({"model.layers.0.self_attn.q_proj.weight": low}))
    with pytest.raises(NotExpressible, match="no LoRA on this tensor"):
        encode(Adapter({"model.other.weight": low}, model=CONFIG))


def test_merged_without_its_config_by_that_of_the_base(tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = {f"model.layers.1.{NAMES[module]}.weight": torch.randn(size) for module, size in SIZES.items()}
    write_checkpoint(tmp_path / "base", base, CONFIG)
    (tmp_path / "tune").mkdir()
    torch.save(state(), tmp_path / "tune/adapter_model.pt")
    receipt = loratools.merge(tmp_path / "base", tmp_path / "tune", tmp_path / "out", alpha_in=3)
    assert receipt["applied"] == receipt["expected"] == len(SIZES)
    found, tensors = load_file(tmp_path / "out/model.safetensors"), state()
    for module, name in NAMES.items():
        change = 1.5 * tensors[f"layers.1.{module}.lora_b.weight"].double() @ tensors[f"layers.1.{module}.lora_a.weight"].double()
        change = permuted(change, {"attn.q_proj": 4, "attn.k_proj": 2}[module]) if module in ("attn.q_proj", "attn.k_proj") else change
        W = base[f"model.layers.1.{name}.weight"]
        torch.testing.assert_close(found[f"model.layers.1.{name}.weight"], (W.double() + change).float(), rtol=0, atol=1e-6)  # one rounding


def test_from_end_to_end(tmp_path: Path) -> None:
    folder = tmp_path / "tune"
    folder.mkdir()
    torch.save(state(), folder / "adapter_model.pt")
    (folder / "adapter_config.json").write_text(json.dumps(PEFT))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert [row.name for row in FORMATS if row.detect(open_container(folder))] == ["torchtune"]
    loratools.convert(folder, tmp_path / "peft", format="peft")
    loratools.convert(folder, tmp_path / "again", format="torchtune")
    assert bytes_of(loratools.load(tmp_path / "again")) == bytes_of(loratools.load(folder))
    assert bytes_of(loratools.load(tmp_path / "peft")).keys() == bytes_of(loratools.load(folder)).keys()
    assert decode(open_container(folder), ReadOptions(alpha=8))["model.layers.1.mlp.gate_proj.weight"].facts()["scaling"] == 4
