"""XLabs' Flux LoRA: the processors of its blocks' attention, each with factors for the streams of image and text.

    double_blocks.N.processor.qkv_lora1.down.weight (r, dim)   .up.weight (3·dim, r)    img_attn.qkv      qkv_lora2: txt_attn.qkv
    double_blocks.N.processor.proj_lora1.…                                             img_attn.proj     proj_lora2: txt_attn.proj
    single_blocks.N.processor.qkv_lora.…    the first rows of linear1, queries, keys and values       proj_lora: linear2

ΔW = up·down, there is no alpha. Read from diffusers 0.42 (`loaders/lora_conversion_utils.py`, `_convert_xlabs_flux_lora_to_diffusers`)
and XLabs-AI/x-flux `src/flux/modules/layers.py`. Names are those of Black Forest Labs' checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Part
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError, LoratoolsError, NotExpressible, ShapeError, raise_all
from loratools.formats._derived import cells
from loratools.formats._refused import KEPT, passengers
from loratools.formats._scale import exact_alpha
from loratools.formats.base import Container, ReadOptions
from loratools.refs import Ref
from loratools.sliced import Sliced

NAME = "xlabs"
MARKS = (".processor.",)
_KEY = re.compile(
    r"(?P<root>diffusion_model\.)?(?P<blocks>double|single)_blocks\.(?P<block>\d+)\.processor\."
    r"(?P<word>qkv_lora[12]?|proj_lora[12]?)\.(?P<side>down|up)\.weight"
)
_WORDS = {
    "double": {"qkv_lora1": "img_attn.qkv", "qkv_lora2": "txt_attn.qkv", "proj_lora1": "img_attn.proj", "proj_lora2": "txt_attn.proj"},
    "single": {"qkv_lora": "linear1", "proj_lora": "linear2"},
}
_ROOTS = ("model.diffusion_model.", "diffusion_model.", "")


def detect(container: Container) -> bool:
    """Whether it holds factors of a Flux block's processor."""
    return any(_KEY.fullmatch(key) for key in container.tensors)


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter in such a file, under Black Forest Labs' names; of a single block's qkv it is a part of linear1's rows.

    Raises FormatError for strays and half pairs, ShapeError for factors that do not meet.
    """
    scale = 1.0 if options is None or options.alpha is None else options.alpha
    pairs: dict[str, dict[str, Ref]] = {}
    keys: dict[str, str] = {}
    faults: list[LoratoolsError] = []
    for key, ref in container.tensors.items():
        match = _KEY.fullmatch(key)
        word = None if match is None else _WORDS[match["blocks"]].get(match["word"])
        if match is None or word is None:
            faults.append(FormatError("not a key of this format", tensor=key, expected="….processor.qkv_lora1.down.weight and its like"))
            continue
        name = f"{match['blocks']}_blocks.{match['block']}.{word}.weight"
        if match["side"] in pairs.setdefault(name, {}):
            faults.append(FormatError("the same tensor twice under two spellings", tensor=key, found=keys[name]))
        pairs[name][match["side"]] = ref
        keys.setdefault(name, key)
    deltas: dict[str, Delta] = {}
    for name, pair in pairs.items():
        try:
            deltas[name] = _delta(name, pair, scale)
        except LoratoolsError as error:
            faults.append(error.at(tensor=keys[name]))
    try:
        raise_all(faults)
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    return Adapter(deltas, {"safetensors": dict(container.metadata)}, {}, container.path, NAME, container.files)


def _delta(name: str, pair: Mapping[str, Ref], scale: float) -> Delta:
    for side in ("down", "up"):
        if side not in pair:
            raise FormatError(f"has no {side} beside it", remedy="the file is incomplete")
    a, b = pair["down"].spec.shape, pair["up"].spec.shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        remedy = "they are swapped" if len(a) == len(b) == 2 and a[1] == b[0] < min(a[0], b[1]) else None
        raise ShapeError("down and up do not meet", found=f"down {list(a)}, up {list(b)}", expected="[r, in], [out, r]", remedy=remedy)
    low = LowRank(A=pair["down"], B=pair["up"], alpha=exact_alpha(scale, a[0]), layer="linear")
    return Part(delta=low, start=0, stop=b[0]) if name.endswith(".linear1.weight") else low


# -- writing


def encode(adapter: Adapter) -> Container:
    """The adapter as such a file, factors as they are.

    Raises NotExpressible for other weights than those of attention, for other kinds and for a scale other than 1.
    """
    faults = passengers(adapter, "these files have")
    tensors: dict[str, Ref] = {}
    for name, delta in adapter.items():
        try:
            tensors |= _encoded(name, delta)
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    raise_all(faults)
    return Container(tensors, {})


def _encoded(name: str, delta: Delta) -> dict[str, Ref]:
    root = next(root for root in _ROOTS if name.startswith(root))
    blocks, _, rest = name.removeprefix(root).partition("_blocks.")
    block, _, leaf = rest.partition(".")
    word = next((word for word, place in _WORDS.get(blocks, {}).items() if f"{place}.weight" == leaf), None)
    if word is None:
        fact, expected = "these files change the attention of Flux' blocks alone", "double_blocks.N.img_attn.qkv and its like"
        raise NotExpressible(fact, expected=expected, remedy="--format comfyui has the others")
    low = _first_rows(delta) if leaf == "linear1.weight" else delta
    if not isinstance(low, LowRank):
        raise NotExpressible(f"these files cannot say {delta.called} delta", remedy="convert it first: --kind lora")
    if low.layer in ("embedding", "transposed", "conv"):
        raise NotExpressible(f"these files have no LoRA of a weight that lies as {low.layer} ones do", remedy=KEPT)
    if leaf == "linear1.weight" and low.B.spec.shape[0] != 3 * low.A.spec.shape[1]:
        fact, remedy = "of linear1 these files change queries, keys and values alone", "--format comfyui has all of its rows"
        raise NotExpressible(fact, found=f"{low.B.spec.shape[0]} rows", expected=3 * low.A.spec.shape[1], remedy=remedy)
    if low.scaling != 1:
        raise NotExpressible("these files have no alpha: the scaling is 1", found=low.scaling, remedy="rescale --bake makes it 1")
    path = f"{blocks}_blocks.{block}.processor.{word}"
    return {f"{path}.down.weight": low.A, f"{path}.up.weight": low.B}


def _first_rows(delta: Delta) -> Delta:
    """A change of linear1's queries, keys and values without the rows of its MLP, where it leaves those as they are."""
    if isinstance(delta, Part) and delta.start == 0:
        return delta.delta
    if not isinstance(delta, LowRank) or len(delta.A.spec.shape) != 2:
        return delta
    rows, own = delta.B.spec.shape[0], 3 * delta.A.spec.shape[1]
    if rows <= own or cells(delta.B)[own:].tobytes().strip(b"\0"):
        return delta
    return replace(delta, B=Sliced(delta.B, slice(0, own)))
