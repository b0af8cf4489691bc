"""Adapters under their network's other names: every row of the table, there and back, the same bytes; what names leave open."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, MatchError, NotExpressible, ShapeError, UsageError
from loratools.layouts.networks import networks
from loratools.layouts.relayout import Relayout, relayout_of
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.layouts._adapters import changes, dense, flat, low, same
from tests.layouts._models import BEYOND
from tests.layouts.test_networks import flux, originals, sd3, unet


def sd1() -> nn.Module:
    """Four blocks, the innermost without attentions; those tell that up_blocks.0 has none."""
    kinds = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 4, 8, 8), layers_per_block=2, norm_num_groups=2, cross_attention_dim=4, attention_head_dim=2,
        down_block_types=kinds, up_block_types=tuple(kind.replace("Down", "Up") for kind in kinds[::-1]),
    )  # fmt: skip


MODELS = {"flux": flux, "sd3": sd3, "sd1": sd1, "sdxl": lambda: unet(2, True)} | {
    name: make for name, make in BEYOND.items() if name not in ("qwen-image", "hidream")  # which have one set of names
}
diffusers = pytest.importorskip("diffusers")
TABLES = ("pos_embed", "positional_encoding", "pos_embed.pos_embed")  # of positions, no parameters
LINEAR1 = "single_blocks.0.linear1.weight"


def own(name: str) -> dict[str, Tensor]:
    """The authors' tensors; of SD3 without the table of positions, which is no parameter."""
    tensors = originals(MODELS[name]())[0]
    return {key: value for key, value in tensors.items() if key not in TABLES}


def converted(deltas: Mapping[str, Delta], side: str, **more: object) -> dict[str, Delta]:
    return relayout_of(deltas, side, **more).apply(deltas)  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix", ["lora_unet", "diffusion_model", ""])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_every_byte_is_the_same(name: str, prefix: str) -> None:
    is_flat = prefix == "lora_unet"
    tensors = {key: value for key, value in own(name).items() if "." in key or not is_flat}  # one alone has no module
    mine = changes(tensors)
    given = flat(mine, prefix) if is_flat else {f"{prefix}.{key}" if prefix else key: delta for key, delta in mine.items()}
    there = converted(given, "diffusers", flat=is_flat)
    root = "" if not prefix else "unet." if name.startswith("sd") and name != "sd3" else "transformer."
    model, pairs = MODELS[name]().state_dict(), originals(MODELS[name]())[1]
    assert set(there) == {root + part for key in mine for part in pairs[key].diffusers}
    for key, delta in there.items():
        assert dense(delta).shape == model[key.removeprefix(root)].shape
    back = converted(there, "original")
    assert set(back) == {f"diffusion_model.{key}" if prefix else key for key in mine}
    assert all(same(delta, mine[key.removeprefix("diffusion_model.")]) for key, delta in back.items())


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_where_the_table_has_them(name: str) -> None:
    """Against slices and halves of ΔW in float64: no sum is formed anew, so no bit differs."""
    tensors, pairs = originals(MODELS[name]())
    mine = changes({key: value for key, value in tensors.items() if key not in TABLES})
    there = converted(mine, "diffusers")
    for key, delta in mine.items():
        pair, whole = pairs[key], dense(delta)
        weight = mine[key.removesuffix("bias") + "weight"] if key.endswith(".bias") else delta
        if pair.swapped(tuple(dense(weight).shape)):
            whole = torch.cat(whole.chunk(2)[::-1])
        starts = pair.starts(len(whole))
        assert starts is not None
        for part, other in enumerate(pair.diffusers):
            assert torch.equal(dense(there[other]), whole[starts[part] : starts[part + 1]])


def test_every_row_of_the_table_is_met() -> None:
    plans = [relayout_of(own(name), "diffusers") for name in MODELS]
    met = {re.sub(r"\d+", "#", place) for plan in plans for step in plan.steps for place in step.places}
    rows = [row for network in networks() if network.name in (*MODELS, "unet") for row in network.rows if row[1] not in TABLES]
    for kind, _, second, *_ in rows:
        for word in second.split(" "):
            # as many channels leave the middle as come, so no model has a shortcut there
            if not (word.startswith("mid_block.") and word.endswith(".conv_shortcut")):
                leaves = ("",) if kind == "tensor" else (".weight", ".bias")
                assert any(re.sub(r"\{\w+\}|\d+", "#", word) + leaf in met for leaf in leaves), word


def test_other_as_are_stacked_and_come_back() -> None:
    parts = {"to_q": low(8, seed=1), "to_k": low(8, seed=4), "to_v": low(8, seed=7)}
    given: dict[str, Delta] = {f"transformer.single_transformer_blocks.0.attn.{part}.weight": delta for part, delta in parts.items()}
    found = converted(given, "original")
    whole = found[f"diffusion_model.{LINEAR1}"]
    assert isinstance(whole, LowRank) and whole.rank == 6 and whole.scaling == 1.5 and len(found) == 1
    # the mlp's 32 rows, which the adapter does not change, are zeros
    expected = torch.cat([*(dense(delta) for delta in parts.values()), torch.zeros(32, 4, dtype=torch.float64)])
    assert (dense(whole) - expected).abs().max() <= 2 * 2.0**-52 * expected.abs().max()
    again = converted(found, "diffusers")
    assert all(same(again[name], delta) for name, delta in given.items())
    assert not dense(again["transformer.single_transformer_blocks.0.proj_mlp.weight"]).any()


def test_blocks_along_a_diagonal_are_their_parts() -> None:
    """sd-scripts' split_qkv: A's one above the other, B's along a diagonal, under the scaling that the file states."""
    names = ["to_q", "to_k", "to_v"]
    parts: dict[str, Delta] = {f"transformer_blocks.0.attn.{name}.weight": low(8, seed=seed) for seed, name in enumerate(names)}
    parts["single_transformer_blocks.0.proj_out.weight"] = low(8, seed=9)  # else SD3's names are no others
    whole = converted(parts, "original")["double_blocks.0.img_attn.qkv.weight"]
    assert isinstance(whole, LowRank) and whole.rank == 6 and whole.alpha == 9
    again = converted({"double_blocks.0.img_attn.qkv.weight": whole}, "diffusers")
    assert len(again) == 3 and all(same(delta, parts[name]) for name, delta in again.items())


def test_dora_and_other_kinds() -> None:
    rows = DoRA(direction=low(24), magnitude=to_ref(torch.arange(24.0).reshape(24, 1)))
    columns = DoRA(direction=low(24), magnitude=to_ref(torch.ones(1, 4)))
    name = "double_blocks.0.img_attn.qkv.weight"
    found = converted({name: rows}, "diffusers")
    k = found["transformer_blocks.0.attn.to_k.weight"]
    assert isinstance(k, DoRA) and k.magnitude.spec.shape == (8, 1) and k.direction.shape() == (8, 4)
    again = converted(found | {"single_transformer_blocks.0.proj_out.weight": low(4)}, "original")[name]
    assert isinstance(again, DoRA) and same(again.direction, rows.direction)
    assert bytes(again.magnitude.read()) == bytes(rows.magnitude.read())
    with pytest.raises(NotExpressible, match=r"qkv\.weight: a DoRA delta along the inputs is one of all rows.*convert --kind lora"):
        converted({name: columns}, "diffusers")
    proj = "double_blocks.0.img_attn.proj.weight"  # not fused: any kind goes by its new name
    assert converted({proj: columns}, "diffusers") == {"transformer_blocks.0.attn.to_out.0.weight": columns}


def test_parts_that_are_no_one_change() -> None:
    attn = "single_transformer_blocks.0.attn"
    with pytest.raises(NotExpressible, match=r"attn\.to_q\.weight: its parts have different scalings.*rescale --bake"):
        converted({f"{attn}.to_q.weight": low(8), f"{attn}.to_k.weight": low(8, alpha=5.0)}, "original")
    with pytest.raises(NotExpressible, match="and none of the others; convert --kind lora"):
        converted({f"{attn}.to_q.weight": DoRA(direction=low(8), magnitude=to_ref(torch.ones(8, 1)))}, "original")
    with pytest.raises(ShapeError, match=r"not in the shares.*found 8, None, None, 8, expected 1:1:1:4"):
        converted({f"{attn}.to_q.weight": low(8), "single_transformer_blocks.0.proj_mlp.weight": low(8)}, "original")
    with pytest.raises(ShapeError, match=r"linear1\.weight: its rows are not those.*found 50, expected a multiple of 7 \(1:1:1:4\)"):
        converted({LINEAR1: low(50)}, "diffusers")


# -- what the names leave open


def plan(*names: str, side: str = "original", **more: object) -> Relayout:
    return relayout_of([f"{name}.weight" for name in names], side, **more)  # type: ignore[arg-type]


def places(found: Relayout) -> list[str]:
    return [place.removesuffix(".weight") for step in found.steps for place in step.places]


def test_two_networks() -> None:
    words = r"transformer\.transformer_blocks\.0\S+: .*two networks.*flux or sd3; give the base.*--network flux$"
    with pytest.raises(AmbiguousError, match=words):
        plan("transformer.transformer_blocks.0.attn.to_q")
    base = {f"transformer.{name}": Spec("F32", tuple(value.shape)) for name, value in flux().state_dict().items()}
    found = plan("transformer.transformer_blocks.0.attn.to_q", base=base)
    assert places(found) == ["diffusion_model.double_blocks.0.img_attn.qkv"]
    both = plan("transformer.transformer_blocks.0.attn.to_q", side="diffusers")  # as they are, either way
    assert places(both) == ["transformer.transformer_blocks.0.attn.to_q"]


@pytest.mark.parametrize(("given", "side", "expected"), [
    ("input_blocks.4.1.proj_in", "diffusers", "down_blocks.1.attentions.0.proj_in"),  # only 2 layers have attentions at 4
    ("output_blocks.1.1.proj_in", "diffusers", "up_blocks.0.attentions.1.proj_in"),  # the same whatever the layers are
    ("up_blocks.0.attentions.0.proj_in", "original", "output_blocks.0.1.proj_in"),
    ("down_blocks.1.attentions.1.proj_in", "original", "input_blocks.5.1.proj_in"),
    ("middle_block.1.proj_in", "diffusers", "mid_block.attentions.0.proj_in"),
])  # fmt: skip
def test_layers_that_names_tell(given: str, side: str, expected: str) -> None:
    assert places(plan(f"unet.{given}", side=side))[0].endswith(expected)
    assert places(plan(f"lora_unet_{given.replace('.', '_')}", side=side, flat=True))[0].endswith(expected)


@pytest.mark.parametrize(("given", "side"), [("input_blocks.7.1.proj_in", "diffusers"), ("down_blocks.1.attentions.0.proj_in", "original")])
def test_layers_that_names_do_not_tell(given: str, side: str) -> None:
    with pytest.raises(AmbiguousError, match="a UNet of 2 layers per block or a UNet of 1 layers per block; give the base with --base"):
        plan(given, side=side)
    own = unet(1).state_dict()
    base = {name: Spec("F32", (1,)) for name in (originals(unet(1))[0] if side == "diffusers" else own)}
    there = {"input_blocks.3.0.in_layers.2": "down_blocks.1.resnets.0.conv1"}
    one, other = (next(iter(there)), there[next(iter(there))])[:: 1 if side == "diffusers" else -1]
    assert places(plan(one, side=side, base=base)) == [other]


def test_an_upsampler_beside_attentions_or_not() -> None:
    with pytest.raises(AmbiguousError, match="whether its block has attentions"):
        plan("unet.up_blocks.0.upsamplers.0.conv")
    told = plan("unet.up_blocks.0.upsamplers.0.conv", "unet.up_blocks.0.attentions.2.proj_in")
    assert places(told)[0] == "diffusion_model.output_blocks.2.2.conv"
    assert places(plan("unet.up_blocks.0.upsamplers.0.conv", side="diffusers")) == ["unet.up_blocks.0.upsamplers.0.conv"]


def test_a_swap_that_only_the_shape_of_a_weight_tells() -> None:
    name, joint = "joint_blocks.2.context_block.adaLN_modulation.1", "joint_blocks.0.x_block.mlp.fc1.weight"
    short: dict[str, Delta] = {f"{name}.weight": low(8, 4), f"{name}.bias": changes({"b": torch.ones(8)})["b"], joint: low(4)}
    found = converted(short, "diffusers")
    there = "transformer_blocks.2.norm1_context.linear"
    for leaf in ("weight", "bias"):
        assert torch.equal(dense(found[f"{there}.{leaf}"]), torch.cat(dense(short[f"{name}.{leaf}"]).chunk(2)[::-1]))
    alone = {f"{name}.bias": short[f"{name}.bias"]}
    with pytest.raises(AmbiguousError, match="whether its halves change places"):
        converted(alone, "diffusers")
    base = {key: Spec("F32", tuple(value.shape)) for key, value in own("sd3").items()}
    assert base[f"{name}.weight"].shape == (16, 8)
    assert torch.equal(dense(converted(alone, "diffusers", base=base)[f"{there}.bias"]), dense(found[f"{there}.bias"]))


@pytest.mark.parametrize(("names", "words"), [
    (["model.layers.0.q.weight", "model.layers.1.q.weight"], "names of no network.*model.layers.0.q.weight, .*those of flux, sd3, "),
    ([f"diffusion_model.{LINEAR1}", "diffusion_model.b.weight"], "1 of 2 names are not flux's, the others are: found b.weight"),
    ([f"diffusion_model.{LINEAR1}", f"model.diffusion_model.{LINEAR1}"], "two of the adapter's tensors are one.*both transformer"),
    ([f"diffusion_model.{LINEAR1}", "transformer.single_transformer_blocks.0.attn.to_q.weight"], "two of the adapter's"),
])  # fmt: skip
def test_names_that_cannot_be_told(names: list[str], words: str) -> None:
    with pytest.raises(MatchError, match=words):
        relayout_of(names, "diffusers")


def test_flat_names_that_begin_as_none() -> None:
    with pytest.raises(MatchError, match=r"x_double_blocks\.weight: a name that begins as no part"):
        relayout_of(["x_double_blocks.weight"], "diffusers", flat=True)


def test_an_adapter_says_it() -> None:
    adapter = Adapter(flat({LINEAR1: low(28), "final_layer.adaLN_modulation.1.weight": low(8)}, "lora_unet"), flat=True)
    found = adapter.relaid("diffusers")
    assert not found.flat and len(found) == 5
    assert found.notes == ("layout diffusers: 2 of 2 names are the other side's (flux, diffusers 0.42); 2 tensors are 5 there",)
    assert found.relaid("diffusers").notes[-1].startswith("layout diffusers: its names are this side's")
    with pytest.raises(UsageError, match="--layout: found bfl, expected original or diffusers"):
        adapter.relaid("bfl")
