"""Writing cloneofsimo's `lora_diffusion` files, as its `save_safeloras_with_embeds` does."""

from __future__ import annotations

import json
from collections.abc import Mapping

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, NotExpressible, raise_all
from loratools.formats._refused import KEPT
from loratools.formats._walks import DEFAULTS, ERAS, PARTS, stable_diffusion, walk
from loratools.formats.base import Container
from loratools.formats.cloneofsimo import EMBED, NAME, TOKEN, targets_of
from loratools.refs import Ref

_OTHERS = "--format diffusers or kohya names each"


def encode(adapter: Adapter) -> Container:
    """The adapter as such a file, factors as they are: of a Stable Diffusion's `unet.` and `text_encoder.`, all modules of some classes.

    Raises NotExpressible for other kinds, for a scale other than 1, for modules of no known class, and where some of a class's are
    missing: indices are counted over all of them.
    """
    faults: list[LoratoolsError] = []
    strange = [name for name in adapter.passengers if not TOKEN.fullmatch(name)]
    faults += [NotExpressible("these files have no place for it", tensor=name, remedy=KEPT) for name in strange]
    lows: dict[str, LowRank] = {}
    for name, delta in adapter.items():
        try:
            lows[name] = _sayable(name, delta)
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    raise_all(faults)
    metadata: dict[str, str] = dict.fromkeys(adapter.passengers, EMBED)
    tensors: dict[str, Ref] = dict(adapter.passengers)
    for part in dict.fromkeys(name.partition(".")[0].partition(":")[0] for name in lows):
        inner = {name.removeprefix(f"{part}."): low for name, low in lows.items() if name.startswith((f"{part}.", f"{part}:"))}
        ordered, targets = _ordered(adapter, part, inner)
        metadata[part] = json.dumps(sorted(targets))
        for index, low in enumerate(ordered):
            metadata[f"{part}:{index}:rank"] = str(low.rank)
            kernel = len(low.A.spec.shape) - 2
            tensors |= {f"{part}:{index}:up": low.B.reshape(*low.B.spec.shape, *(1,) * kernel), f"{part}:{index}:down": low.A}
    return Container(tensors, metadata)


def _sayable(name: str, delta: Delta) -> LowRank:
    if name.partition(".")[0].partition(":")[0] not in PARTS or not name.endswith(".weight"):
        expected = " or ".join(f"{part}.…" for part in PARTS)
        raise NotExpressible("lies in no part that these files have", expected=expected, remedy="--format diffusers or kohya has others")
    if not isinstance(delta, LowRank):
        raise NotExpressible(f"these files cannot say {delta.called} delta", remedy="convert it first: --kind lora")
    if delta.layer in ("embedding", "transposed"):
        raise NotExpressible(f"these files have no LoRA of a weight that lies as {delta.layer} ones do", remedy=KEPT)
    if delta.scaling != 1:
        raise NotExpressible("these files have no alpha: the scaling is 1", found=delta.scaling, remedy="rescale --bake makes it 1")
    return delta


def _ordered(adapter: Adapter, part: str, lows: Mapping[str, LowRank]) -> tuple[list[LowRank], frozenset[str]]:
    """The part's changes in the order in which they are counted, and the classes whose layers they are."""
    told = targets_of(adapter.metadata.get("safetensors", {}), part) if adapter.format == NAME else DEFAULTS[part]
    if all(name.startswith(f"{part}:") for name in lows):
        return list(lows.values()), told[0]
    era = adapter.metadata.get(NAME, {}).get("order", ERAS[0])
    plain = {name.replace("text_model.", "", 1) if part == "text_encoder" else name: low for name, low in lows.items()}
    best: list[str] = []
    for targets in told:
        for version in (1, 2):
            names = [name.replace("text_model.", "", 1) for name in walk(stable_diffusion(part, version), targets, era)]
            if set(names) == set(plain):
                return [plain[name] for name in names], targets
            best = max(best, names, key=lambda found: (len(set(found) & set(plain)), -len(found)))
    stray = next((name for name in plain if name not in best), None)
    fact = "these files count all of a Stable Diffusion's modules of some classes"
    if stray is not None:
        raise NotExpressible(f"{fact}, and this is none of them", tensor=f"{part}.{stray}", remedy=_OTHERS)
    lacking = next(name for name in best if name not in plain)
    raise NotExpressible(f"{fact}, and this adapter has none for one", tensor=f"{part}.{lacking}", remedy=_OTHERS)
