"""litgpt's adapters: `get_lora_AB` of both of its orders of rows in float64, the slots that are enabled, from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import loratools
from loratools.adapter import Adapter
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, FormatError, ShapeError
from loratools.formats import FORMATS
from loratools.formats.base import Container, open_container
from loratools.formats.litgpt import decode
from loratools.tensors import read_tensor, to_ref

HEAD, GROUPS, SIZE, EMBD, RANK = 4, 2, 4, 16, 2
SLOTS = (HEAD * SIZE, GROUPS * SIZE, GROUPS * SIZE)
MODEL = {"name": "Llama-tiny", "n_head": HEAD, "n_query_groups": GROUPS, "n_embd": EMBD}
EVERY = [(True, True, True), (True, False, True), (False, False, True), (True, True, False)]


def hyper(on: tuple[bool, ...]) -> dict[str, object]:
    return {"lora_r": RANK, "lora_alpha": 3, "lora_query": on[0], "lora_key": on[1], "lora_value": on[2]}


def state(on: tuple[bool, ...], module: str = "qkv") -> dict[str, Tensor]:
    torch.manual_seed(0)
    rows = sum(size for size, flag in zip(SLOTS, on, strict=True) if flag)
    name = f"transformer.h.0.attn.{module}"
    found = {f"{name}.lora_A": torch.randn(RANK * sum(on), EMBD), f"{name}.lora_B": torch.randn(rows, RANK)}
    return found | {"transformer.h.0.mlp.proj.lora_A": torch.randn(RANK, 24), "transformer.h.0.mlp.proj.lora_B": torch.randn(EMBD, RANK)}


def container(tensors: dict[str, Tensor], on: tuple[bool, ...], model: dict[str, object] | None = None) -> Container:
    beside = {"hyperparameters.yaml": hyper(on), "model_config.yaml": MODEL if model is None else model}
    return Container({name: to_ref(tensor) for name, tensor in tensors.items()}, beside=beside)


def expected(A: Tensor, B: Tensor, on: tuple[bool, ...], *, interleaved: bool) -> Tensor:
    """get_lora_AB: each enabled slot's product, then `zero_pad` by the indices of its era, as q above k above v."""
    sizes = [size for size, flag in zip(SLOTS, on, strict=True) if flag]
    product = torch.cat([b @ a for a, b in zip(A.double().chunk(sum(on)), B.double().split(sizes), strict=True)]) * (3 / RANK)
    total, group = sum(SLOTS), HEAD // GROUPS + 2
    kinds = [(row // SIZE) % group for row in range(total)]
    grouped = [[row for row in range(total) if (kinds[row] < group - 2, kinds[row] == group - 2, kinds[row] == group - 1)[slot]]
               for slot in range(3)]  # fmt: skip
    plain = [list(range(sum(SLOTS[:slot]), sum(SLOTS[: slot + 1]))) for slot in range(3)]
    where = grouped if interleaved else plain
    full = torch.zeros(total, EMBD, dtype=torch.float64)
    index = list(range(total)) if all(on) else [row for slot in range(3) if on[slot] for row in where[slot]]
    full[index] = product
    return torch.cat([full[rows] for rows in where])


def change(adapter: Adapter, name: str, rows: int) -> Tensor:
    if name not in adapter:
        return torch.zeros(rows, EMBD, dtype=torch.float64)
    low = adapter[name]
    assert isinstance(low, LowRank)
    return low.scaling * read_tensor(low.B, torch.float64) @ read_tensor(low.A, torch.float64)


def bytes_of(adapter: Adapter) -> dict[str, dict[str, bytes]]:
    return {name: {field: bytes(ref.read()) for field, ref in delta.refs().items()} for name, delta in adapter.items()}


@pytest.mark.parametrize("on", EVERY)
@pytest.mark.parametrize("module", ["qkv", "attn"])
def test_both_orders_of_rows(module: str, on: tuple[bool, ...]) -> None:
    tensors = state(on, module)
    adapter = decode(container(tensors, on))
    name = f"transformer.h.0.attn.{module}"
    want = expected(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], on, interleaved=module == "attn")
    slots = zip("qkv", SLOTS, strict=True)
    found = torch.cat([change(adapter, f"model.layers.0.self_attn.{side}_proj.weight", rows) for side, rows in slots])
    torch.testing.assert_close(found, want)  # the same products, summed in another order


@pytest.mark.parametrize("on", EVERY)
def test_from_end_to_end(tmp_path: Path, on: tuple[bool, ...]) -> None:
    folder = tmp_path / "lit"
    folder.mkdir()
    tensors = state(on)
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    text = "".join(f"{key}: {str(value).lower()}\n" for key, value in hyper(on).items())
    (folder / "hyperparameters.yaml").write_text("checkpoint_dir: x\n" + text)
    (folder / "model_config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in MODEL.items()) + "hf_config:\n  name: y\n")
    assert [row.name for row in FORMATS if row.detect(open_container(folder))] == ["litgpt"]
    first = loratools.load(folder)
    loratools.convert(folder, tmp_path / "again", format="litgpt")
    assert bytes_of(loratools.load(tmp_path / "again")) == bytes_of(first)
    written = torch.load(tmp_path / "again/lit_model.pth.lora", weights_only=True)["model"]
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items()) and len(written) == len(tensors)
    loratools.convert(folder, tmp_path / "peft", format="peft")
    assert bytes_of(loratools.load(tmp_path / "peft")) == bytes_of(first)


def test_what_nothing_tells() -> None:
    on = (True, False, True)
    waiting = decode(container(state(on), on, {}))
    with pytest.raises(AmbiguousError, match="nothing tells; give --base"):
        bytes_of(waiting)
    base = {"model_type": "llama", "num_attention_heads": HEAD, "num_key_value_heads": GROUPS, "hidden_size": EMBD}
    assert waiting.pending is not None and "model.layers.0.self_attn.v_proj.weight" in waiting.pending(base)
    tensors = {name: to_ref(tensor) for name, tensor in state(on).items()}
    with pytest.raises(AmbiguousError, match="no alpha"):
        decode(Container(tensors, beside={"model_config.yaml": MODEL}))
    told = {"lora_alpha": 3}
    with pytest.raises(AmbiguousError, match="which of q, k and v are enabled"):
        decode(Container(tensors, beside={"hyperparameters.yaml": told, "model_config.yaml": MODEL}))
    with pytest.raises(ShapeError, match="not the factors of q, k and v"):
        decode(container(state(on), (False, True, True)))
    with pytest.raises(FormatError, match="not a tensor litgpt writes"):
        decode(container({**state(on), "transformer.wte.weight": torch.ones(2, 2)}, on))
