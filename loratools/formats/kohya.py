"""kohya and LyCORIS: one safetensors file, module paths with underscores for dots, `lora_unet_…`, `lora_te1_…`, and a suffix.

`lora_unet_mid_block_attentions_0_proj_in.lora_down.weight` (r, in, *kernel), `.lora_up.weight` (out, r, 1…), `.alpha` (); LyCORIS puts
other suffixes in their place (`_slots`). Each module has its own rank and alpha. Read from sd-scripts `networks/lora*.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from loratools.adapter import Adapter
from loratools.deltas.adjoined import Adjoined
from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.deltas.padded import Padded
from loratools.errors import FormatError, LoratoolsError, NotExpressible, UnsupportedError, raise_all
from loratools.flatnames import PARTS, flatten, spelt, split_prefix
from loratools.formats._digests import sealed
from loratools.formats._module import Slots
from loratools.formats._network import network
from loratools.formats._refused import KEPT
from loratools.formats._slots import SUFFIX, collect, made
from loratools.formats._spelt import carried, spelt_tensors
from loratools.formats._turned import OWN, own_slots
from loratools.formats.base import Container, ReadOptions
from loratools.refs import Ref

NAME = "kohya"
_FLATTENED = re.compile(r"_(lora_(?:down|up|mid)\.weight)$")  # some converters flattened the suffix too
_PASSENGER = re.compile(r"(?:bundle_emb\.|emb_params$|<)")  # textual inversions that ride along


def detect(container: Container) -> bool:
    """Whether its tensors' names begin as this family's do and hold no dot before the suffix."""
    return container.config is None and any(_module(key) for key in container.tensors)


def _module(key: str) -> str | None:
    head = _FLATTENED.sub(r".\1", key).partition(".")[0]
    return head if split_prefix(head) is not None and SUFFIX.fullmatch(_FLATTENED.sub(r".\1", key)) else None


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter in a kohya or LyCORIS file, under its flat names; textual inversions ride along as passengers.

    Raises FormatError for tensors that belong to no module of a known kind, AmbiguousError for an alpha of 0 and for a flat
    magnitude of a square weight.
    """
    options = options or ReadOptions()
    passengers = {key: ref for key, ref in container.tensors.items() if _PASSENGER.match(key)}
    try:
        modules, others = collect(_spelt({key: ref for key, ref in container.tensors.items() if key not in passengers}))
        timed = next((key for key in others if key.endswith(".lambda_layer")), None)
        if timed is not None:
            raise UnsupportedError("T-LoRA, whose rank depends on the timestep: no one change of a weight", tensor=timed)
        _as_parts(modules)
        deltas, faults = made(modules, lambda module, slots: options.alpha)
        faults += _strays(others, modules)
        raise_all(faults)
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    return Adapter(
        deltas, {"safetensors": dict(container.metadata)}, passengers, container.path, NAME, container.files, flat=True,
        notes=_notes(deltas, container.metadata),
    )  # fmt: skip


def _notes(deltas: Mapping[str, Delta], metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What LyCORIS' files of GLoRA do not hold: the scale of rsLoRA under which it was trained, and which its own loader leaves out too."""
    if '"rs_lora": "true"' not in metadata.get("ss_network_args", "").lower() or not any(isinstance(d, Adjoined) for d in deltas.values()):
        return ()
    return ("GLoRA trained with rs_lora: read under alpha / r, as LyCORIS' and ComfyUI's loaders do, not alpha / √r, as it was trained",)


def _as_parts(modules: Mapping[str, Slots]) -> None:
    """sd-scripts' rotations of a whole weight as those of its one part: the prefix tells them from LyCORIS', which have another bound."""
    for name, slots in modules.items():
        if name.startswith(OWN) and "oft_blocks" in slots:
            slots.refs["oft_blocks.0"], slots.keys["oft_blocks.0"] = slots.refs.pop("oft_blocks"), slots.keys.pop("oft_blocks")


def _spelt(tensors: Mapping[str, Ref]) -> dict[str, Ref]:
    """The tensors under keys whose suffix has its dot."""
    found: dict[str, Ref] = {}
    for key, ref in tensors.items():
        spelt = _FLATTENED.sub(r".\1", key)
        if spelt in found:
            raise FormatError("the same tensor twice under two spellings", tensor=key, found=spelt)
        found[spelt] = ref
    return found


def _strays(others: Mapping[str, Ref], modules: Mapping[str, object]) -> list[LoratoolsError]:
    faults: list[LoratoolsError] = [FormatError("no tensor of this family", tensor=key) for key in others]
    strange = [name for name in modules if split_prefix(name) is None]
    return faults + [FormatError("a name that begins as none of this family", tensor=name) for name in strange]


# -- writing


def encode(adapter: Adapter) -> Container:
    """The adapter as kohya's and LyCORIS' loaders read it: flat names as they are, of exact ones the dots made underscores.

    A model that is no pipeline's part gets the prefix `lora_unet`. Raises NotExpressible for what the suffixes cannot say and for
    modules whose names would be spelt alike.
    """
    faults: list[LoratoolsError] = []
    strange = [name for name in adapter.passengers if not _PASSENGER.match(name)]
    faults += [NotExpressible("kohya's files have no place for it", tensor=name, remedy=KEPT) for name in strange]
    raise_all(faults)
    stated = carried(adapter)
    indexed = stated.get("ss_network_module") == "networks.oft_flux"
    tensors = spelt_tensors(adapter, _namer(adapter), _LACKING, lambda word, delta: _own(word, delta, indexed=indexed))
    metadata = network(tensors, stated)
    return Container(tensors | dict(adapter.passengers), metadata, seal=sealed(metadata))


_LACKING: Mapping[type[Delta], str] = {
    Replacement: "--format comfyui has whole tensors, and --format loratools",
    Padded: "--format comfyui has weights that grow, and --format loratools",
}


def _own(word: str, delta: Delta, *, indexed: bool) -> dict[str, Ref] | None:
    return own_slots(delta, indexed=indexed) if word.startswith(OWN) else None


def _namer(adapter: Adapter) -> Callable[[str], str]:
    parts = {part for name in adapter for part in PARTS if name.startswith(f"{part}.")}

    def named(module: str) -> str:
        if adapter.flat or ("." not in module and split_prefix(module) is not None):
            return module
        word = spelt(module, parts)
        if not module or (word is None and parts):
            fact = "lies in no part of the pipeline, and other modules do" if module else "a tensor of no module"
            raise NotExpressible(fact, expected=" or ".join(sorted(parts)) or None, remedy=KEPT)
        alone = "lora_te" if module.startswith("text_model.") else "lora_unet"  # CLIP's text encoder on its own, else the network
        return word or f"{alone}_{flatten(module)}"

    return named
