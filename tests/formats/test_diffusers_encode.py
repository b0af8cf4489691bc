"""Writing diffusers' files: its metadata tells every scale, read back it is the same adapter; what diffusers cannot say."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full
from loratools.deltas.loha import LoHa
from loratools.deltas.lowrank import LowRank
from loratools.errors import NotExpressible
from loratools.formats.diffusers import decode, detect
from loratools.formats.diffusers_encode import encode
from loratools.refs import Ref
from loratools.tensors import to_ref
from tests.formats.test_spelt import low, refs, same
from tests.strategies import randn, seeds


def ref(*shape: int, seed: int) -> Ref:
    return to_ref(randn(*shape, seed=seed))


def dora(seed: int, alpha: float, *kernel: int, axis: str = "out") -> DoRA:
    return DoRA(direction=low(seed, alpha, *kernel), magnitude=ref(*((6, 1) if axis == "out" else (1, 4)), seed=seed))


ALPHAS = st.floats(1e-3, 1e3) | st.sampled_from([1.0, 16.0, 1 / 3])
MODULES = st.lists(st.tuples(ALPHAS, st.integers(1, 3), st.sampled_from([(), (1, 1), (3, 2)])), min_size=1, max_size=4)


PIPELINES = st.fixed_dictionaries({"unet.": MODULES}, optional={"text_encoder.": MODULES}) | st.fixed_dictionaries({"": MODULES})


@given(PIPELINES, st.booleans(), seeds)
def test_read_back_it_is_the_same(parts: dict[str, list[tuple[float, int, tuple[int, ...]]]], doras: bool, seed: int) -> None:
    deltas: dict[str, Delta] = {}
    for prefix, modules in parts.items():
        for i, (alpha, rank, kernel) in enumerate(modules):
            name = f"{prefix}mid_block.{i}.to_q.weight"
            deltas[name] = dora(seed + i, alpha, *kernel) if doras else low(seed + i, alpha, *kernel, rank=rank)
    written = encode(Adapter(deltas))
    assert detect(written) and written.name == "pytorch_lora_weights.safetensors"
    once = decode(written)
    assert once.notes == () and same(once, decode(encode(once)))
    assert same(Adapter(deltas), once)


def test_the_metadata_is_each_parts_config() -> None:
    alphas = {"a": 4.0, "b": 4.0, "c.0": 0.5}
    deltas: dict[str, Delta] = {f"unet.mid.{name}.weight": low(i, alpha) for i, (name, alpha) in enumerate(alphas.items())}
    deltas["text_encoder.fc1.weight"] = low(9, 3.0, rank=3, rslora=True)
    deltas["text_encoder.fc1.bias"] = Full(diff=ref(6, seed=0), scale=3 / math.sqrt(3))
    stated = json.loads(encode(Adapter(deltas)).metadata["lora_adapter_metadata"])
    assert stated["unet.r"] == 2 and stated["unet.lora_alpha"] == 4 and stated["unet.alpha_pattern"] == {"^mid\\.c\\.0": 0.5}
    assert stated["unet.rank_pattern"] == {} and stated["unet.target_modules"] == ["mid.a", "mid.b", "mid.c.0"]
    assert stated["text_encoder.use_rslora"] is True and stated["text_encoder.lora_bias"] is True and stated["unet.use_rslora"] is False
    read = decode(encode(Adapter(deltas)))
    assert read["text_encoder.fc1.weight"].facts()["scaling"] == pytest.approx(math.sqrt(3), rel=1e-15)


BIAS = Full(diff=ref(6, seed=0), scale=1.5)
LOHA = LoHa(**refs(0, w1_a=(6, 2), w1_b=(2, 4), w2_a=(6, 2), w2_b=(2, 4)), scale=1.0)
FAULTS: list[tuple[dict[str, Delta], str]] = [
    ({"unet.x.weight": LOHA}, "unet.x.weight: diffusers cannot say a LoHa delta; convert it first: --kind lora"),
    ({"unet.x.gamma": low(0)}, "unet.x.gamma: diffusers cannot say a LoRA delta"),
    ({"weight": low(0)}, "weight: diffusers cannot say a LoRA delta"),
    ({"unet.x.weight": low(0, layer="embedding")}, "a LoRA of a weight that lies as embedding ones do"),
    ({"unet.x.weight": dora(0, 1.0, axis="in")}, "diffusers has DoRA along the outputs only; convert --magnitude-axis out"),
    ({"unet.x.weight": dora(0, 1.0), "unet.y.weight": low(1)}, "unet.y.weight: use_dora holds for a whole part"),
    ({"unet.x.weight": low(0), "unet.x.bias": BIAS, "unet.y.weight": low(1)}, "unet.y.bias: lora_bias holds for a whole part"),
    ({"unet.x.weight": dora(0, 3.0), "unet.x.bias": BIAS}, "unet.x.bias: peft allows no lora_bias beside DoRA"),
    ({"unet.x.weight": low(0, 1.0), "unet.x.bias": BIAS}, "unet.x.bias: a bias difference needs a LoRA of the same scaling"),
    ({"unet.x.bias": BIAS}, "unet.x.bias: a bias difference needs a LoRA of the same scaling"),
    ({"unet.x.weight": low(0), "elsewhere.x.weight": low(1)}, "elsewhere.x.weight: lies in no part of a pipeline"),
    ({"model.diffusion_model.x.weight": low(0)}, "model.diffusion_model.x.weight: a name of a single-file checkpoint's layout"),
]


@pytest.mark.parametrize(("deltas", "text"), FAULTS)
def test_what_diffusers_cannot_say(deltas: dict[str, Delta], text: str) -> None:
    with pytest.raises(NotExpressible) as caught:
        encode(Adapter(deltas))
    assert text in str(caught.value)


def test_a_part_without_rslora_says_the_scaling_by_alpha() -> None:
    deltas = {"unet.x.weight": low(0, 3.0, rslora=True), "unet.y.weight": low(1, 3.0)}
    read = decode(encode(Adapter(deltas)))
    for name, delta in deltas.items():
        assert isinstance(delta, LowRank) and read[name].facts()["scaling"] == delta.scaling
