"""Which of several networks an adapter is of where its names do not tell: by sizes, block numbers, and an option that settles it."""

from __future__ import annotations

import pytest

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.errors import AmbiguousError, MatchError, UsageError
from loratools.formats.base import Container
from loratools.formats.comfyui import decode as dotted
from loratools.formats.kohya import decode as flat
from loratools.layouts.evidence import NEVER, NOT, weight
from loratools.layouts.networks import networks
from loratools.layouts.relayout import Relayout, relayout_of
from tests.formats.keytables import TABLES, container
from tests.layouts._adapters import low

Q = "transformer_blocks.0.attn.to_q"


def plan(shapes: dict[str, tuple[int, int]], side: str, **words: object) -> Relayout:
    deltas: dict[str, Delta] = {f"{name}.weight": low(rows, width, rank=1) for name, (rows, width) in shapes.items()}
    return relayout_of(deltas, side, **words)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shapes", "side", "expected"), [
    ({Q: (1536, 1536)}, "original", "sd3"),
    ({Q: (2432, 2432)}, "original", "sd3"),
    ({Q: (3072, 3072)}, "original", "flux"),
    ({"transformer_blocks.23.attn.to_q": (8, 8)}, "original", "sd3"),  # Flux has 19 blocks
    ({"transformer_blocks.19.attn.to_q": (3072, 3072), "transformer_blocks.0.ff.net.2": (3072, 12288)}, "original", "hunyuan-video"),
    ({"transformer_blocks.59.attn.to_q": (3072, 3072), Q: (3072, 3072)}, "original", "qwen-image"),
    ({"layers.0.attention.qkv": (40, 24)}, "diffusers", "lumina2"),  # 3:1:1 rows of 24 columns
    ({"layers.0.attention.qkv": (72, 24)}, "diffusers", "z-image"),
    ({"layers.0.attention.qkv": (40, 24), "layers.0.attention.out": (24, 24)}, "diffusers", "lumina2"),
    ({"layers.0.attention.out": (2304, 2304)}, "diffusers", "lumina2"),
    ({"layers.0.attention.out": (3840, 3840)}, "diffusers", "z-image"),
    ({"single_blocks.0.linear1": (56, 8)}, "diffusers", "flux"),
    ({"single_blocks.0.linear1": (72, 8)}, "diffusers", "flux2"),
    ({"double_blocks.0.img_mlp.0": (48, 8), "double_blocks.0.img_mlp.2": (8, 24)}, "diffusers", "flux2"),
    ({"double_blocks.0.img_mlp.0": (32, 8), "double_blocks.0.img_mlp.2": (8, 32)}, "diffusers", "flux"),
])  # fmt: skip
def test_sizes_and_numbers(shapes: dict[str, tuple[int, int]], side: str, expected: str) -> None:
    assert plan(shapes, side).titles == (expected,)


def test_what_nothing_tells_is_an_error_that_an_option_settles() -> None:
    with pytest.raises(AmbiguousError, match=r"found flux or sd3; give the base with --base, .*, or name the network: --network flux$"):
        plan({Q: (8, 8)}, "original")
    found = {name: plan({Q: (8, 8)}, "original", network=name).steps[0].places for name in ("flux", "sd3", "hunyuan-video", "qwen-image")}
    assert found == {
        "flux": ("double_blocks.0.img_attn.qkv.weight",), "sd3": ("joint_blocks.0.x_block.attn.qkv.weight",),
        "hunyuan-video": ("double_blocks.0.img_attn_qkv.weight",), "qwen-image": (f"{Q}.weight",),
    }  # fmt: skip
    with pytest.raises(AmbiguousError, match=r"found z-image or lumina2; .*--network z-image$"):
        plan({"layers.0.attention.out": (8, 8)}, "diffusers")


def test_an_option_that_is_none_or_does_not_fit() -> None:
    with pytest.raises(UsageError, match="--network: found bfl, expected flux or sd3 or hunyuan-video or "):
        plan({Q: (8, 8)}, "original", network="bfl")
    with pytest.raises(MatchError, match=r"names of no network .*transformer_blocks.0.attn.to_q.weight, expected those of wan; leave out"):
        plan({Q: (8, 8)}, "original", network="wan")


def test_flux_goes_before_what_has_its_names_and_that_is_said() -> None:
    shapes = {"single_transformer_blocks.0.norm.linear": (24, 8)}
    found = plan(shapes, "original")
    assert found.titles == ("flux",) and found.twins == ("hunyuan-video",)
    assert found.said().endswith("; if it is of hunyuan-video, whose names are the same, say so with --network")
    told = plan(shapes, "original", network="hunyuan-video")
    assert told.titles == ("hunyuan-video",) and not told.twins and "if it is" not in told.said()
    assert plan(shapes, "diffusers").twins == ()  # as they are, either way


def test_flat_names_that_two_have_with_other_dots() -> None:
    """Those of HunyuanVideo's attentions and Flux': one name under diffusers, two under their authors'."""
    given = {"lora_unet_double_blocks_0_img_attn_qkv.weight": low(24, 8)}
    assert relayout_of(given, "diffusers", flat=True).twins == ()
    found = relayout_of(given, "original", flat=True, network="hunyuan-video")
    assert found.steps[0].places == ("diffusion_model.double_blocks.0.img_attn_qkv.weight",)
    assert relayout_of(given, "original", flat=True).twins == ("hunyuan-video",)
    adapter = Adapter(given, flat=True)
    assert list(adapter.relaid("original", network="hunyuan-video")) == ["diffusion_model.double_blocks.0.img_attn_qkv.weight"]


def test_weights() -> None:
    flux, sd3 = networks()[:2]
    names = [f"{Q}.weight"]
    pairs = flux.pairs(names, whole=False)
    assert weight(flux, pairs, names, {}) == 0
    assert weight(flux, pairs, names, {names[0]: (3072, 3072)}) == 1
    assert weight(flux, pairs, ["transformer_blocks.18.attn.to_q.weight"], {}) == 1  # its last
    assert weight(flux, pairs, ["transformer_blocks.19.attn.to_q.weight"], {}) == NEVER
    assert weight(flux, pairs, ["x"], {"transformer_blocks.0.ff.net.0.proj.weight": (31, 8)}) == NOT
    assert weight(flux, pairs, ["x"], {"double_blocks.0.img_attn.qkv.weight": (25, 8)}) == NOT
    assert weight(sd3, sd3.pairs(names, whole=False), names, {names[0]: (3072, 3072)}) == 0


KNOWN = {"anima": "cosmos2", "krea2": "krea2", "qwen": "qwen-image", "flux": "flux"}


@pytest.mark.parametrize("name", TABLES)
def test_recorded_tables_of_networks(name: str) -> None:
    held: Container = container(name)
    if not any(key.startswith(("lora_", "diffusion_model.")) for key in held.tensors):
        return  # diffusers' own names, which `tests/ops/test_layout.py` has
    adapter = (dotted if next(iter(held.tensors)).startswith("diffusion_model.") else flat)(held)
    for side in ("diffusers", "original"):
        found = relayout_of(adapter, side, flat=adapter.flat)
        assert found.titles[-1] == KNOWN[name.partition("_")[0]] and not found.twins
