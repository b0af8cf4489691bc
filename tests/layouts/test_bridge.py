"""A base under an adapter's names: which tensors get another name, what rows they are, and where deltas of them come to lie."""

from __future__ import annotations

import pytest
import torch

from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parts import Joined, Parts
from loratools.errors import UnsupportedError
from loratools.layouts.bridge import Bridge, Stretch, bridge_of
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.layouts._adapters import changes, dense, low
from tests.layouts.test_networks import flux, originals, sd3

QKV, Q, K = "double_blocks.0.img_attn.qkv.weight", "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_k.weight"
THEIRS = {name: Spec("F32", tuple(value.shape)) for name, value in flux().state_dict().items()}
OWN = {name: Spec("F32", tuple(value.shape)) for name, value in originals(flux())[0].items()}


def rooted(root: str, specs: dict[str, Spec]) -> dict[str, Spec]:
    return {f"{root}.{name}": spec for name, spec in specs.items()}


def test_names_that_meet_change_nothing() -> None:
    bridge = bridge_of([QKV], OWN, flat=False)
    assert bridge.specs == OWN and bridge.aliases == {} and bridge.said([QKV]) == []


def test_another_model_is_left_alone() -> None:
    base = {"model.layers.0.q.weight": Spec("F32", (4, 4))}
    assert bridge_of(["x.weight"], base, flat=False) == Bridge(base)


def test_parts_of_a_fused_tensor_are_its_rows() -> None:
    bridge = bridge_of([Q, K], OWN, flat=False)
    assert [bridge.aliases[name].stretches for name in (Q, K)] == [(Stretch(QKV, 0, 8, False),), (Stretch(QKV, 8, 16, False),)]
    assert bridge.specs[K].shape == (8, 8) and QKV not in bridge.specs
    assert bridge.said([Q, K]) == ["names aligned: 2 of 2 are others in the base (flux, bfl names, diffusers 0.42)"]
    placed, faults = bridge.place({Q: low(8, 8), K: low(8, 8, seed=5)})
    assert not faults and set(placed) == {QKV}
    found = placed[QKV]
    assert isinstance(found, Joined) and [(part.start, part.stop) for part in found.parts] == [(0, 8), (8, 16)]


def test_a_part_that_is_no_difference() -> None:
    bridge = bridge_of([Q], OWN, flat=False)
    placed, faults = bridge.place({Q: DoRA(direction=low(8, 8), magnitude=to_ref(torch.ones(8, 1)))})
    assert not faults and isinstance(placed[QKV], Parts)


def test_a_fused_tensor_is_cut_to_those_of_the_base() -> None:
    bridge = bridge_of([QKV], THEIRS, flat=False)
    assert bridge.specs[QKV].shape == (24, 8)
    whole = low(24, 8)
    placed, faults = bridge.place({QKV: whole})
    assert not faults and len(placed) == 3
    assert torch.equal(dense(placed[K]), dense(whole)[8:16])


def test_halves_change_places() -> None:
    ours, there = "final_layer.adaLN_modulation.1", "norm_out.linear"
    given: dict[str, Delta] = {f"{ours}.weight": low(16, 8), f"{ours}.bias": changes({"b": torch.ones(16)})["b"]}
    bridge = bridge_of(given, THEIRS, flat=False)
    assert bridge.aliases[f"{ours}.weight"].stretches == (Stretch(f"{there}.weight", 8, 16, False), Stretch(f"{there}.weight", 0, 8, False))
    placed, faults = bridge.place(given)
    assert not faults
    for leaf in ("weight", "bias"):
        found = placed[f"{there}.{leaf}"]
        assert isinstance(found, Joined)
        rows = [dense(part.delta) for part in found.parts]
        assert torch.equal(torch.cat(rows), torch.cat(dense(given[f"{ours}.{leaf}"]).chunk(2)[::-1]))


def test_a_last_context_block_by_its_shape() -> None:
    tensors = {name: Spec("F32", tuple(value.shape)) for name, value in sd3().state_dict().items()}
    names = [f"joint_blocks.{block}.context_block.adaLN_modulation.1.{leaf}" for block in (1, 2) for leaf in ("weight", "bias")]
    bridge = bridge_of(names, tensors, flat=False)
    assert [len(bridge.aliases[name].stretches) for name in names] == [1, 1, 2, 2]


def test_a_transpose() -> None:
    own = {"text_projection": Spec("F32", (4, 6)), "transformer.resblocks.0.attn.in_proj_weight": Spec("F32", (12, 4))}
    root, name = "conditioner.embedders.1.model", "text_encoder_2.text_projection.weight"
    bridge = bridge_of([name], rooted(root, own), flat=False)
    assert bridge.specs[name].shape == (6, 4)
    given = low(6, 4)
    placed, _ = bridge.place({name: given})
    found = placed[f"{root}.text_projection"]
    assert isinstance(found, LowRank) and torch.equal(dense(found), dense(given).T)


SCALE = "double_blocks.0.img_attn.norm.query_norm.scale"


@pytest.mark.parametrize("root", ["", "model.diffusion_model."])
def test_a_bare_parameter_as_a_modules_weight(root: str) -> None:
    """ComfyUI has `query_norm.scale.set_weight`, LyCORIS `query_norm.w_norm`; neither is said, for the tensor is the one they name."""
    base = rooted(root[:-1], OWN) if root else OWN
    for name in (f"diffusion_model.{SCALE}.weight", f"diffusion_model.{SCALE.removesuffix('.scale')}.weight"):
        bridge = bridge_of([name], base, flat=False)
        alias = f"{root}{name.removeprefix('diffusion_model.')}"
        assert bridge.aliases[alias].stretches == (Stretch(f"{root}{SCALE}", 0, 4, True),) and bridge.said([alias]) == []
    flat = bridge_of(["lora_unet_double_blocks_0_img_attn_norm_query_norm.weight"], base, flat=True)
    assert set(flat.aliases) == {f"{root}{SCALE.removesuffix('.scale')}.weight"}
    theirs = bridge_of([f"diffusion_model.{SCALE}.weight"], THEIRS, flat=False)
    assert theirs.aliases[f"diffusion_model.{SCALE}.weight"].stretches[0].base == "transformer_blocks.0.attn.norm_q.weight"


LAYER = "encoder.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("root", ["text_encoder", "cond_stage_model.transformer", ""])
@pytest.mark.parametrize("theirs", ["", "text_model."])
@pytest.mark.parametrize("mine", ["", "text_model."])
def test_clip_of_transformers_5_in_memory_and_in_files(root: str, theirs: str, mine: str) -> None:
    spec = Spec("F32", (4, 4))
    base = {f"{root}.{theirs}{LAYER}" if root else theirs + LAYER: spec}
    bridge = bridge_of([f"text_encoder.{mine}{LAYER}"], base, flat=False)
    expected = f"text_encoder.{mine}{LAYER}" if root else mine + LAYER  # a prefix that all have is aligned behind this
    assert expected in bridge.specs and set(bridge.place({expected: low(4)})[0]) == set(base)
    flat = bridge_of([f"lora_te_{mine.replace('.', '_')}encoder_layers_0_self_attn_q_proj.weight"], base, flat=True)
    assert list(flat.specs) == [f"{root}.{mine}{LAYER}" if root else mine + LAYER]
    placed, faults = flat.place({next(iter(flat.specs)): low(4)})
    assert list(placed) == list(base) and not faults


def test_names_that_are_the_same_under_another_root() -> None:
    """Of a network that is in no table, and beside a text encoder, so that no prefix is every name's."""
    spec = Spec("F32", (4, 4))
    base = {"model.diffusion_model.blocks.0.x.weight": spec, f"cond_stage_model.transformer.text_model.{LAYER}": spec}
    names = ["transformer.blocks.0.x.weight", f"text_encoder.text_model.{LAYER}"]
    bridge = bridge_of(names, base, flat=False)
    assert set(bridge.specs) == set(names)
    assert bridge.said(names) == ["names aligned: 2 of 2 are others in the base (they lie under another root)"]
    placed, _ = bridge.place(dict.fromkeys(names, low(4)))
    assert set(placed) == set(base)


def test_a_weight_that_is_anothers_is_no_bare_parameter() -> None:
    assert bridge_of(["x.weight"], {"x.weight": Spec("F32", (2,)), "x": Spec("F32", (2,))}, flat=False).aliases == {}
    assert set(bridge_of(["x.weight"], {"x": Spec("F32", (2,))}, flat=False).aliases) == {"x.weight"}  # of a model that is in no table


def test_other_roots_and_flat_names() -> None:
    base = rooted("model.diffusion_model", OWN)
    dotted = bridge_of([f"transformer.{Q}"], base, flat=False)
    assert dotted.aliases[f"transformer.{Q}"].stretches[0].base == f"model.diffusion_model.{QKV}"
    same_names = bridge_of([f"diffusion_model.{QKV}", f"diffusion_model.{Q.replace('0', '1', 1)}"], base, flat=False)
    assert same_names.aliases[f"diffusion_model.{QKV}"].stretches == (Stretch(f"model.diffusion_model.{QKV}", 0, 24, True),)
    flat = bridge_of(["lora_unet_transformer_blocks_0_attn_to_q.weight"], base, flat=True)
    assert f"model.diffusion_model.{Q}" in flat.specs  # which flat names meet as any base's


def test_two_deltas_on_one_tensor() -> None:
    bridge = bridge_of([QKV, Q], OWN, flat=False)
    assert QKV in bridge.specs and Q in bridge.aliases
    for order in ({QKV: low(24, 8), Q: low(8, 8)}, {Q: low(8, 8), QKV: low(24, 8)}):
        _, faults = bridge.place(order)
        assert [str(fault) for fault in faults] == [f"{list(order)[1]}: two of the adapter's deltas lie on this tensor: found {QKV}"]


def test_faults_name_the_adapters_tensors() -> None:
    bridge = bridge_of([QKV], THEIRS, flat=False)
    columns = DoRA(direction=low(24, 8), magnitude=to_ref(torch.ones(1, 8)))
    _, (fault,) = bridge.place({QKV: columns})
    assert isinstance(fault, UnsupportedError) and str(fault).startswith(f"{QKV}: a DoRA delta along the inputs is one of all rows")


def test_rows_that_the_shares_do_not_divide_have_no_other_name() -> None:
    base = OWN | {QKV: Spec("F32", (25, 8))}
    assert Q not in bridge_of([Q, "transformer_blocks.1.attn.to_q.weight"], base, flat=False).specs
