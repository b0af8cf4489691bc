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
from loratools.formats import FORMATS
from loratools.formats.base import Container, ReadOptions
from loratools.formats.opening import open_container
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
    with pytest.raises(NotExpressible, match=r"q_proj\.weight: .* in several ways.*; convert --base"):
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


# -- what does not fit

Q, W1 = "layers.1.attn.q_proj", "layers.1.mlp.w1"
CONFIGS: dict[str, tuple[dict[str, object], type[LoratoolsError], str]] = {
    "rank": ({"r": 8}, ShapeError, r"the rank is not that of adapter_config\.json: found 2, expected 8"),
    "alpha": ({"lora_alpha": "x"}, FormatError, r"adapter_config\.json: lora_alpha: found x, expected a number"),
    "no finite number": ({"lora_alpha": float("nan")}, FormatError, "lora_alpha: found nan, expected a number"),
    "no number": ({"lora_alpha": False}, FormatError, "lora_alpha: found False"),
    "a field": ({"use_rslora": True}, FormatError, "a field torchtune does not write: found use_rslora"),
}
TENSORS: dict[str, tuple[dict[str, Tensor], type[LoratoolsError], str]] = {
    "a stack": ({f"{Q}.lora_a.weight": torch.ones(2, 2, 16)}, ShapeError, "not a factor: found .2, 2, 16."),
    "empty": ({f"{Q}.lora_a.weight": torch.ones(0, 16)}, ShapeError, "not a factor.*ZeRO-3"),
    "ranks": ({f"{Q}.lora_b.weight": torch.ones(16, 3)}, ShapeError, r"layers\.1\.attn\.q_proj"),
    "heads": ({f"{Q}.lora_b.weight": torch.ones(12, 2)}, ShapeError, "not the rows of q or k of the model's heads: found 12"),
    "a magnitude": ({f"{W1}.magnitude": torch.ones(5)}, ShapeError, "a magnitude of another size than B"),
    "experts": ({"layers.1.moe.experts.lora_gate_a": torch.ones(2, 2)}, UnsupportedError, "LoRA of grouped experts"),
    "a module": (
        {"layers.1.conv.lora_a.weight": torch.ones(2, 2), "layers.1.conv.lora_b.weight": torch.ones(2, 2)}, FormatError,
        "not a module that torchtune has in a llama: expected layers",
    ),
}  # fmt: skip


def refused(found: Container, error: type[LoratoolsError], said: str) -> None:
    """The first of its faults is of that class, and says that."""
    with pytest.raises(LoratoolsError, match=said) as caught:
        decode(found)
    assert isinstance(getattr(caught.value, "errors", [caught.value])[0], error)


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_do_not_fit(case: str) -> None:
    more, error, said = CONFIGS[case]
    found = container(state())
    refused(Container(found.tensors, config={**PEFT, **more}, beside=found.beside), error, said)


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case: str) -> None:
    more, error, said = TENSORS[case]
    refused(container(state() | more), error, said)


def test_heads_that_nothing_tells_and_half_a_dora_of_a_fused_weight() -> None:
    refused(container(state(), {"model_type": "llama"}), AmbiguousError, "where its rows lie depends on the model's heads")
    half = state() | {f"{Q}.magnitude": torch.ones(16)}
    refused(container(half, {**CONFIG, "model_type": "phi3"}), NotExpressible, "a DoRA of some rows of a fused weight")
    refused(container(state(), {**CONFIG, "num_key_value_heads": "2"}), FormatError, "config.json: the heads")


def test_what_else_it_cannot_say(tmp_path: Path) -> None:
    def low(rank: int = 2, alpha: float = 4.0) -> LowRank:
        return LowRank(A=to_ref(torch.ones(rank, 16)), B=to_ref(torch.ones(16, rank)), alpha=alpha, layer="linear")

    v, o = "model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    for other, said in ((low(3, 6.0), "one rank for all modules.*resize --rank"), (low(alpha=5.0), "one alpha.*rescale --bake")):
        with pytest.raises(NotExpressible, match=said):
            encode(Adapter({v: low(), o: other}, model=CONFIG))
    with pytest.raises(NotExpressible, match="DoRA along rows only; convert --magnitude-axis out"):
        encode(Adapter({v: DoRA(direction=low(), magnitude=to_ref(torch.ones(1, 16)))}, model=CONFIG))
    with pytest.raises(AmbiguousError, match="where its rows lie depends on the model's heads"):
        encode(Adapter({"model.layers.0.self_attn.q_proj.weight": low()}, model={"model_type": "llama"}))
    with pytest.raises(OptionError, match="a folder of weights and a config"):
        loratools.save(Adapter({v: low()}, model=CONFIG), tmp_path / "out.pt", format="torchtune")


def test_its_own_config_and_the_bases_must_have_the_same_heads() -> None:
    """Rows of q and k lie by the heads: of another model's they would be permuted to other places, and fit all the same."""
    read = decode(container(state()))
    assert read.pending is not None
    assert bytes_of(read.pending(CONFIG)) == bytes_of(read)
    other = {**CONFIG, "num_attention_heads": 8, "num_key_value_heads": 4}  # of half the size
    with pytest.raises(MatchError, match=r"its heads, in config\.json, are not the base's: found .*, expected "):
        read.pending(other)
