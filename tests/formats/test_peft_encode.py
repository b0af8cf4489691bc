"""Writing peft's files: decoding what was encoded gives the same adapter, encoding what peft wrote gives its tensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain, Part
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, NotExpressible, OptionError
from loratools.formats import encode, load, save
from loratools.formats.peft import decode
from loratools.tensors import read_tensor, to_ref
from tests.files import read_adapter
from tests.interop.zoo import TARGETS, difference, new_base, outputs, wrap
from tests.strategies import floats, randn, seeds

MODULES = [
    "q",
    "model.layers.0.q_proj",
    "model.layers.1.q_proj",
    "model.layers.11.q_proj",
    "a+b.c[0]",
    "k_proj",
    "layers_0_q",
    "Q",
    "x.default.q",
]


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """What peft's LoRA can say: low-rank deltas with DoRA or not, biases, whole tensors, mixed ranks and alphas."""
    dora, rslora, biased = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    deltas: dict[str, Delta] = {}
    for module in draw(st.lists(st.sampled_from(MODULES), unique=True, min_size=1)):
        layer, rank, seed, dtype = (
            draw(st.sampled_from(["unknown", "embedding", "conv"])),
            draw(st.integers(1, 5)),
            draw(seeds),
            draw(floats),
        )
        kernel = draw(st.sampled_from([(3,), (1, 1), (2, 3), (1, 1, 1)])) if layer == "conv" else ()
        low = LowRank(
            A=to_ref(randn(rank, 6, *kernel, seed=seed, dtype=dtype)), B=to_ref(randn(7, rank, seed=seed + 1, dtype=dtype)),
            alpha=draw(st.sampled_from([1.0, 8.0, 3.5, -2.0, 0.1])), rslora=rslora, layer=layer,
        )  # fmt: skip
        if layer == "embedding":  # stored the other way round
            low = dataclasses.replace(low.transposed(), layer=layer)
        shape = low.shape()
        deltas[f"{module}.weight"] = low
        if dora:
            magnitude = randn(1, shape[1], seed=seed) if layer == "embedding" else randn(shape[0], *(1,) * (len(shape) - 1), seed=seed)
            deltas[f"{module}.weight"] = DoRA(direction=low, magnitude=to_ref(magnitude))
        elif biased and layer != "embedding":
            deltas[f"{module}.bias"] = Full(diff=to_ref(randn(7, seed=seed)), scale=low.scaling)
        if draw(st.integers(0, 4)) == 0:
            saved = Replacement(value=to_ref(randn(*shape, seed=seed + 5, dtype=dtype)))
            deltas[f"{module}.weight"] = Chain(first=saved, then=deltas[f"{module}.weight"])
    for name in draw(
        st.lists(
            st.sampled_from(["head.weight", "head.bias", "norm.weight", "norm.bias", "scale", "bn.running_mean", "o.bias"]), unique=True
        )
    ):
        deltas[name] = Replacement(value=to_ref(randn(3, seed=draw(seeds), dtype=draw(floats))))
    return Adapter(deltas)


def _low(delta: Delta) -> LowRank:
    delta = delta.then if isinstance(delta, Chain) else delta
    low = delta.direction if isinstance(delta, DoRA) else delta
    assert isinstance(low, LowRank)
    return low


def equal(one: Delta, other: Delta) -> bool:
    """The same kinds, the same bytes, the same numbers."""
    if type(one) is not type(other) or one.refs().keys() != other.refs().keys():
        return False
    for name, ref in one.refs().items():
        theirs = other.refs()[name]
        if ref.spec != theirs.spec or bytes(ref.read()) != bytes(theirs.read()):
            return False
    if isinstance(one, Chain) and isinstance(other, Chain):
        return equal(one.first, other.first) and equal(one.then, other.then)
    if isinstance(one, DoRA) and isinstance(other, DoRA):
        return equal(one.direction, other.direction)
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return (one.alpha, one.rslora, one.layer) == (other.alpha, other.rslora, other.layer)
    return not isinstance(one, Full) or one.scale == other.scale  # type: ignore[attr-defined]


@given(adapters())
@settings(max_examples=200)
def test_decoding_what_was_encoded_is_the_identity(adapter: Adapter) -> None:
    container = encode(adapter)
    again = decode(container)
    assert set(again) == set(adapter)
    for name, delta in adapter.items():
        assert equal(delta, again[name]), name
    assert {key: bytes(ref.read()) for key, ref in encode(again).tensors.items()} == {
        key: bytes(ref.read()) for key, ref in container.tensors.items()
    }
    assert encode(again).config == container.config


@given(adapters())
@settings(max_examples=20)
def test_by_way_of_files(adapter: Adapter) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save(adapter, Path(folder) / "out")
        again = load(Path(folder) / "out")
        assert all(equal(delta, again[name]) for name, delta in adapter.items()) and set(again) == set(adapter)


def test_a_folder_takes_no_name_of_a_file(tmp_path: Path) -> None:
    adapter = Adapter(deltas={"a.weight": LowRank(A=to_ref(torch.ones(1, 3)), B=to_ref(torch.ones(2, 1)), alpha=1.0, layer="linear")})
    with pytest.raises(OptionError, match="a folder of weights and a config"):
        save(adapter, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


PEFT: dict[str, dict[str, Any]] = {
    "plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"conv.": 3, "^linear": 1}, "alpha_pattern": {"(.*)3": 11, "gpt": 0.3}},
    "lora_bias": {"lora_bias": True, "target_modules": [name for name in TARGETS if name != "table"]},
    "saved": {"modules_to_save": ["head", "norm"], "bias": "lora_only"}, "biases": {"bias": "all"},
}  # fmt: skip


@pytest.mark.parametrize("name", PEFT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_encoding_what_peft_wrote_gives_its_tensors_and_peft_reads_it(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    config = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | PEFT[name]
    model = wrap(new_base(tmp_path / "base", dtype), tmp_path / "adapter", **config)
    save(load(tmp_path / "adapter"), tmp_path / "again")
    (theirs, _), (ours, written) = read_adapter(tmp_path / "adapter"), read_adapter(tmp_path / "again")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    reread = PeftModel.from_pretrained(new_base(tmp_path / "unused", dtype), tmp_path / "again").eval()
    errors = difference(outputs(reread), outputs(model))
    assert max(errors.values()) <= 1e-12, (written, errors)  # the same weights through the same arithmetic


def test_the_config_is_small_sorted_and_complete() -> None:
    low = LowRank(A=to_ref(randn(2, 3, seed=0)), B=to_ref(randn(4, 2, seed=1)), alpha=8.0, layer="linear")
    other = dataclasses.replace(low, alpha=1.5, A=to_ref(randn(1, 3, seed=0)), B=to_ref(randn(4, 1, seed=0)))
    config = encode(Adapter({"a.q.weight": low, "b.q.weight": low, "c.q.weight": other})).config
    assert config is not None and list(config) == sorted(config)
    assert config["r"] == 2 and config["lora_alpha"] == 8 and type(config["lora_alpha"]) is int
    assert config["rank_pattern"] == {r"^c\.q": 1} and config["alpha_pattern"] == {r"^c\.q": 1.5}
    assert config["target_modules"] == ["a.q", "b.q", "c.q"] and config["peft_type"] == "LORA" and not config["fan_in_fan_out"]
    json.dumps(config)


def test_a_pattern_means_one_module_only() -> None:
    """peft takes the first regular expression that fits the end of a name; ours are anchored at its start."""
    low = LowRank(A=to_ref(randn(2, 3, seed=0)), B=to_ref(randn(4, 2, seed=1)), alpha=8.0)
    modules = ["q", "a.q", "b.a.q", "axq", "a.q.x"]
    adapter = Adapter({f"{module}.weight": dataclasses.replace(low, alpha=float(i)) for i, module in enumerate(modules, 1)})
    again = decode(encode(adapter))
    assert [_low(again[f"{module}.weight"]).alpha for module in modules] == [1, 2, 3, 4, 5]


def test_rank_stabilised_and_plain_modules_side_by_side() -> None:
    low = LowRank(A=to_ref(randn(4, 3, seed=0)), B=to_ref(randn(4, 4, seed=1)), alpha=8.0)
    adapter = Adapter({"a.weight": low, "b.weight": low, "c.weight": dataclasses.replace(low, rslora=True)})
    again = decode(encode(adapter))
    assert [_low(delta).scaling for delta in again.values()] == [2.0, 2.0, 4.0]


def lora(**more: Any) -> LowRank:
    return dataclasses.replace(LowRank(A=to_ref(randn(2, 3, seed=0)), B=to_ref(randn(4, 2, seed=1)), alpha=8.0, layer="linear"), **more)


def ref(*shape: int) -> Any:
    return to_ref(torch.ones(shape))


INEXPRESSIBLE: dict[str, dict[str, Delta]] = {
    "DoRA along the other axis": {"a.weight": DoRA(direction=lora(), magnitude=ref(1, 3))},
    "DoRA beside LoRA": {"a.weight": DoRA(direction=lora(), magnitude=ref(4, 1)), "b.weight": lora()},
    "DoRA over a full difference": {"a.weight": DoRA(direction=Full(diff=ref(4, 3)), magnitude=ref(4, 1))},
    "a full difference": {"a.weight": Full(diff=ref(4, 3))},
    "a bias of one module only": {"a.weight": lora(), "a.bias": Full(diff=ref(4), scale=4.0), "b.weight": lora()},
    "a bias of another scale": {"a.weight": lora(), "a.bias": Full(diff=ref(4), scale=3.0)},
    "a part": {"a.weight": Part(delta=lora(), start=0, stop=4)},
}


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_what_peft_cannot_say(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotExpressible) as caught:
        save(Adapter(INEXPRESSIBLE[name]), tmp_path / "out")
    assert any(tensor.rpartition(".")[0] + "." in str(caught.value) for tensor in INEXPRESSIBLE[name])
    assert list(tmp_path.iterdir()) == []


def test_passengers_are_refused() -> None:
    with pytest.raises(LoratoolsError, match="<style>"):
        encode(Adapter({"a.weight": lora()}, passengers={"<style>": ref(2)}))


def test_bytes_are_not_touched() -> None:
    A = torch.tensor([[float("nan"), -0.0, 1e-45]])
    container = encode(Adapter({"a.weight": LowRank(A=to_ref(A), B=ref(4, 1), alpha=1.0)}))
    found: Tensor = read_tensor(container.tensors["base_model.model.a.lora_A.weight"])
    assert found.view(torch.int32).tolist() == A.view(torch.int32).tolist()
