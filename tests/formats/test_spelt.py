"""Writing kohya's and ComfyUI's files: read back, every factor has the same bytes and every alpha is the same; what they cannot say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from loratools import convert, merge
from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import Unsettled
from loratools.deltas.loha import LoHa
from loratools.deltas.lokr import LoKr
from loratools.deltas.lowrank import LowRank
from loratools.deltas.scaled import Scaled
from loratools.deltas.tucker import Tucker
from loratools.errors import LoratoolsError, NotExpressible
from loratools.formats import comfyui, encode, kohya, load, native
from loratools.formats._scalar import number
from loratools.refs import Ref
from loratools.tensors import read_tensor, to_ref
from tests.files import read_checkpoint, write_checkpoint
from tests.strategies import randn, seeds


def ref(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Ref:
    return to_ref(randn(*shape, seed=seed, dtype=dtype))


def low(seed: int, alpha: float = 3.0, *kernel: int, out: int = 6, rank: int = 2, **more: object) -> LowRank:
    layer = "conv" if kernel else "linear"
    return LowRank(A=ref(rank, 4, *kernel, seed=seed), B=ref(out, rank, seed=seed + 1), alpha=alpha, **{"layer": layer, **more})


def refs(seed: int, **shapes: tuple[int, ...]) -> dict[str, Ref]:
    return {name: ref(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}


KINDS: dict[str, Callable[[int, float], Delta]] = {
    "linear": lambda seed, alpha: low(seed, alpha),
    "half": lambda seed, alpha: replace(low(seed, alpha), B=ref(6, 2, seed=seed, dtype=torch.bfloat16)),
    "conv": lambda seed, alpha: low(seed, alpha, 3, 2),
    "point": lambda seed, alpha: low(seed, alpha, 1, 1),
    "dora": lambda seed, alpha: DoRA(direction=low(seed, alpha), magnitude=ref(6, 1, seed=seed)),
    "dora of inputs": lambda seed, alpha: DoRA(direction=low(seed, alpha, 3, 2), magnitude=ref(1, 4, 1, 1, seed=seed)),
    "dora of a difference": lambda seed, alpha: DoRA(direction=Full(diff=ref(6, 4, seed=seed)), magnitude=ref(6, 1, seed=seed)),
    "full": lambda seed, alpha: Full(diff=ref(6, 4, seed=seed)),
    "norm": lambda seed, alpha: Full(diff=ref(6, seed=seed)),
    "tucker": lambda seed, alpha: Tucker(**refs(seed, up=(6, 2), mid=(2, 2, 3, 3), down=(2, 4)), alpha=alpha),
    "loha": lambda seed, alpha: LoHa(
        **refs(seed, w1_a=(6, 2), w1_b=(2, 4), w2_a=(6, 2), w2_b=(2, 4)), scale=alpha / 2, alpha=alpha
    ),
    "doha": lambda seed, alpha: DoRA(
        direction=LoHa(**refs(seed, w1_a=(6, 2), w1_b=(2, 36), w2_a=(6, 2), w2_b=(2, 36)), scale=alpha / 2, alpha=alpha),
        magnitude=ref(1, 4, 1, 1, seed=seed),
    ),
    "lokr": lambda seed, alpha: LoKr(**refs(seed, w1=(2, 2), w2_a=(3, 1), w2_b=(1, 2)), scale=alpha, alpha=alpha),
    "lokr tucker": lambda seed, alpha: LoKr(
        **refs(seed, w1=(2, 2), w2_a=(2, 3), w2_b=(2, 2), t2=(2, 2, 3, 3)), scale=alpha / 2, alpha=alpha
    ),
    "lokr whole": lambda seed, alpha: LoKr(**refs(seed, w1=(2, 2), w2=(3, 2)), scale=1.0, alpha=alpha),
}  # fmt: skip
ONLY = {
    "kohya": {"scaled": lambda seed, alpha: Scaled(l=ref(4, seed=seed), axis=1, offset=1.0)},
    "comfyui": {"replacement": lambda seed, alpha: Replacement(value=ref(6, 4, seed=seed), new=False)},
}
CODECS = {"kohya": kohya, "comfyui": comfyui}
ALPHAS = st.floats(1e-3, 1e3) | st.sampled_from([1.0, 16.0, 1 / 3])


def same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters have the same deltas: kinds, facts, and every tensor byte for byte."""
    assert set(one) == set(other)
    for name, delta in one.items():
        found = other[name]
        assert (found.kind, found.facts()) == (delta.kind, delta.facts()), name
        assert set(found.refs()) == set(delta.refs())
        for part, held in delta.refs().items():
            assert bytes(held.read()) == bytes(found.refs()[part].read()) and held.spec == found.refs()[part].spec, (name, part)
    return True


@given(st.data(), st.sampled_from(sorted(CODECS)), seeds)
def test_read_back_it_is_the_same(data: st.DataObject, format: str, seed: int) -> None:
    kinds = KINDS | ONLY[format]
    chosen = data.draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=4))
    flat, root = format == "kohya", {"kohya": "lora_unet_block_", "comfyui": "diffusion_model.block."}[format]
    deltas = {f"{root}{i}.weight": kinds[kind](seed + 10 * i, data.draw(ALPHAS)) for i, kind in enumerate(chosen)}
    deltas |= {f"{root}{i}.bias": Full(diff=ref(6, seed=seed)) for i in range(len(chosen)) if i % 2}
    adapter, codec = Adapter(deltas, flat=flat), CODECS[format]
    assert codec.detect(codec.encode(adapter))
    once = codec.decode(codec.encode(adapter))
    assert same(adapter, once) and same(once, codec.decode(codec.encode(once)))


def test_alphas_are_float32_where_that_is_exact() -> None:
    assert number(1 / 3).spec.dtype == "F64" and number(1e300).spec.dtype == "F64"
    found = number(0.5)
    assert found.spec.dtype == "F32" and found.spec.shape == () and float(read_tensor(found)) == 0.5
    tensors = encode(Adapter({"lora_unet_x.weight": low(0, 4.0, rslora=True)}, flat=True), "kohya").tensors
    alpha = float(read_tensor(tensors["lora_unet_x.alpha"], torch.float64))
    assert alpha / 2 == 4.0 / math.sqrt(2)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["blocks.0.to_q", "blocks.0.to_out.0"], ["lora_unet_blocks_0_to_q", "lora_unet_blocks_0_to_out_0"]),
        (["unet.mid.to_q", "text_encoder.fc1"], ["lora_unet_mid_to_q", "lora_te_fc1"]),
        (["unet.mid.to_q", "text_encoder.fc1", "text_encoder_2.fc1"], ["lora_unet_mid_to_q", "lora_te1_fc1", "lora_te2_fc1"]),
        (["diffusion_model.mid.to_q"], ["lora_unet_mid_to_q"]), (["model.diffusion_model.mid.to_q"], ["lora_unet_mid_to_q"]),
    ],
)  # fmt: skip
def test_exact_names_made_flat(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    adapter = Adapter({f"{name}.weight": low(i) for i, name in enumerate(names)})
    tensors = encode(adapter, "kohya").tensors
    assert {key.partition(".")[0] for key in tensors} == set(expected)
    save_file({key: read_tensor(ref) for key, ref in tensors.items()}, tmp_path / "a.safetensors")
    W = {f"{name}.weight": randn(6, 4, seed=9).double() for name in names}
    merge(write_checkpoint(tmp_path / "base", W), tmp_path / "a.safetensors", tmp_path / "flat")
    merge(tmp_path / "base", adapter, tmp_path / "exact")
    flat, exact = read_checkpoint(tmp_path / "flat"), read_checkpoint(tmp_path / "exact")
    assert all(torch.equal(flat[name], exact[name]) and not torch.equal(flat[name], W[name]) for name in W)


def test_metadata_and_passengers_stay_and_stale_digests_go(tmp_path: Path) -> None:
    tensors = {"lora_unet_x.lora_up.weight": randn(6, 2, seed=0), "lora_unet_x.lora_down.weight": randn(2, 4, seed=1)}
    said = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "sshs_model_hash": "00", "sshs_legacy_hash": "00"}
    save_file(tensors | {"bundle_emb.style.clip_l": randn(2, 8, seed=1)}, tmp_path / "a.safetensors", metadata=said)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="kohya")
    found = load(tmp_path / "b.safetensors")
    held = found.metadata["safetensors"]
    assert {key: held[key] for key in said if key.startswith("ss_")} == {"ss_network_module": "networks.lora", "ss_network_dim": "2"}
    assert "00" not in held.values()  # tests/formats/test_digests.py tells what they are
    assert list(found.passengers) == ["bundle_emb.style.clip_l"] and same(load(tmp_path / "a.safetensors"), found)
    assert encode(Adapter({"x.y.weight": KINDS["loha"](0, 1.0)}), "kohya").metadata["ss_network_module"] == "lycoris.kohya"


@pytest.mark.parametrize("format", ["comfyui", "diffusers"])
def test_a_base_gives_flat_names_their_dots_back(tmp_path: Path, format: str) -> None:
    flat = Adapter({"lora_unet_mid_block_to_q.weight": low(0)}, flat=True)
    with pytest.raises(NotExpressible, match=r"lora_unet_mid_block_to_q\.weight: where its name has dots only the base tells; .*--base"):
        encode(flat, format)
    base = write_checkpoint(tmp_path / "base", {"mid_block.to_q.weight": randn(6, 4, seed=9)})
    convert(flat, tmp_path / "out.safetensors", format=format, base=base)
    keys = {"comfyui": "diffusion_model.mid_block.to_q.lora_up.weight", "diffusers": "mid_block.to_q.lora_B.weight"}
    with (tmp_path / "out.safetensors").open("rb") as file:
        assert keys[format].encode() in file.read()


def test_names_that_are_flat_already_get_no_second_prefix() -> None:
    deltas = {"lora_unet_mid_to_q.weight": low(0)}
    assert list(encode(Adapter(deltas), "kohya").tensors) == list(encode(Adapter(deltas, flat=True), "kohya").tensors)


def test_the_own_formats_keys_under_flat_names_are_not_kohyas() -> None:
    assert not kohya.detect(native.encode(Adapter({"lora_unet_mid_to_q.weight": low(0)})))


WHOLE = refs(0, w1=(2, 2), w2=(3, 2))
CONV1D = refs(0, w1=(2, 2), w2=(3, 2, 3))
IA3 = Scaled(l=ref(6, seed=0), offset=1.0)
FAULTS: list[tuple[str, dict[str, Delta], str]] = [
    ("kohya", {"x.y.weight": low(0, 0.0)}, "x.y.weight: alpha is 0, which kohya reads as the rank"),
    ("kohya", {"x.y.weight": LoKr(**WHOLE, scale=0.5)}, "two whole factors under a scale; LyCORIS multiplies them by 1: found 0.5"),
    ("kohya", {"x.y.weight": LoKr(**CONV1D, scale=1.0, exchanged=True)}, "indices are exchanged"),
    ("kohya", {"x.y.weight": Full(diff=ref(6, 4, seed=0), scale=0.5)}, "a difference under a factor: found 0.5, expected 1"),
    ("kohya", {"x.y.weight": Scaled(l=to_ref(torch.tensor([1e-30])))}, "factors told from 0, which told from 1 no F64 holds exactly"),
    ("kohya", {"x.y.weight": low(0, layer="embedding")}, "only as a whole difference; convert it first: --kind dense"),
    ("kohya", {"x.y.weight": Replacement(value=ref(6, 4, seed=0))}, "cannot say a replacement delta; --format comfyui"),
    ("kohya", {"x.y.gamma": low(0)}, "x.y.gamma: a LoRA delta of neither a weight nor a bias"),
    ("kohya", {"weight": low(0)}, "weight: a tensor of no module"),
    ("kohya", {"unet.x.weight": low(0), "elsewhere.x.weight": low(1)}, "elsewhere.x.weight: lies in no part of the pipeline"),
    ("kohya", {"a.b_c.weight": low(0), "a_b.c.weight": low(1)}, "a_b.c.weight: another module's name is spelt alike"),
    ("comfyui", {"x.y.weight": Unsettled(delta=IA3)}, "x.y.weight: this format cannot say an (IA)³ delta; ComfyUI has no (IA)³"),
    ("comfyui", {"x.y.weight": IA3}, "x.y.weight: this format cannot say an (IA)³ delta; ComfyUI has no (IA)³"),
    ("comfyui", {"unet.x.weight": low(0)}, "unet.x.weight: its name is none that a single-file checkpoint has"),
    ("comfyui", {"weight": low(0)}, "its name is none that a single-file checkpoint has"),
]


@pytest.mark.parametrize(("format", "deltas", "text"), FAULTS)
def test_what_they_cannot_say(format: str, deltas: dict[str, Delta], text: str) -> None:
    with pytest.raises(NotExpressible) as caught:
        encode(Adapter(deltas), format)
    assert text in str(caught.value)


@pytest.mark.parametrize("format", ["kohya", "comfyui", "diffusers"])
def test_passengers_of_others_and_weights_that_may_lie_turned(format: str) -> None:
    with pytest.raises(LoratoolsError, match=r"style: .*have no place for it"):
        encode(Adapter({"x.y.weight": low(0)}, passengers={"style": ref(2, seed=0)}), format)
    turned = {"peft": {"fan_in_fan_out": True}}
    for delta in (low(0, layer="unknown"), Unsettled(delta=KINDS["lokr"](0, 1.0))):
        with pytest.raises(LoratoolsError, match=r"x\.y\.weight: whether its weight is stored transposed is not known yet; give the base"):
            encode(Adapter({"x.y.weight": delta}, metadata=turned), format)
        if delta.kind == "lora" or format != "diffusers":
            assert encode(Adapter({"x.y.weight": delta}), format).tensors


def test_textual_inversions_go_through_the_own_format_and_back(tmp_path: Path) -> None:
    tensors = {"lora_unet_x.lora_up.weight": randn(6, 2, seed=0), "lora_unet_x.lora_down.weight": randn(2, 4, seed=1)}
    riding = {"bundle_emb.style.clip_l": randn(2, 8, seed=1), "emb_params": randn(1, 8, seed=2)}
    save_file(tensors | riding, tmp_path / "a.safetensors")
    base = write_checkpoint(tmp_path / "base", {"x.weight": randn(6, 4, seed=9)})
    convert(tmp_path / "a.safetensors", tmp_path / "own.safetensors", format="loratools", base=base)
    own = load(tmp_path / "own.safetensors")
    assert set(own.passengers) == set(riding)
    found = encode(own, "kohya").tensors
    assert all(torch.equal(read_tensor(found[key]), tensor) for key, tensor in riding.items())
    convert(tmp_path / "own.safetensors", tmp_path / "back.safetensors", format="kohya")
    assert set(load(tmp_path / "back.safetensors").passengers) == set(riding)
