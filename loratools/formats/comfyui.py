"""ComfyUI and BFL: dotted names under `diffusion_model.` or `text_encoders.`, with kohya's, LyCORIS' or peft's suffixes.

Also whole differences `.diff` and `.diff_b`, replacements `.set_weight`; BFL's own control LoRAs. Without an alpha the scale is 1. Read
from ComfyUI `comfy/lora.py`, `comfy/lora_convert.py` and `comfy/weight_adapter/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.deltas.adjoined import Adjoined
from loratools.deltas.base import Delta
from loratools.deltas.butterfly import Butterfly
from loratools.deltas.rotated import Rotated
from loratools.deltas.scaled import Scaled
from loratools.errors import FormatError, LoratoolsError, NotExpressible, raise_all
from loratools.flatnames import PARTS
from loratools.formats._digests import resealed
from loratools.formats._refused import passengers
from loratools.formats._scale import ALPHA
from loratools.formats._slots import SPELLINGS, collect, made
from loratools.formats._spelt import carried, pack, spelt_tensors
from loratools.formats._unread import check_unread
from loratools.formats.base import Container, ReadOptions
from loratools.refs import InMemory, Ref, Spec

NAME = "comfyui"
ROOTS = ("diffusion_model.", "text_encoders.")

_BFL = ("double_blocks.", "single_blocks.")  # with which BFL's own control LoRAs begin, that have no root
_SD1 = "cond_stage_model.transformer."  # its only text encoder in single-file checkpoints


def detect(container: Container) -> bool:
    """Whether its modules lie under `diffusion_model.` or `text_encoders.` and end as changes of them do, or are BFL's own.

    A file of loralib's, whose bare factors may lie there too, tells its alpha in the metadata.
    """
    keys = container.tensors
    if container.config is not None or ALPHA in container.metadata:
        return False
    return any(key.startswith(ROOTS) and SPELLINGS.fullmatch(key) for key in keys) or _without_root(keys)


def _without_root(keys: Iterable[str]) -> bool:
    return any(key.startswith(_BFL) and key.endswith(".lora_A.weight") for key in keys)


def _rooted(tensors: Mapping[str, Ref]) -> dict[str, tuple[str, Ref]]:
    """BFL's control LoRAs under ComfyUI's keys, each with its own: scales of norms are whole, and the first layer grows to its A's width.

    Read from ComfyUI `comfy/lora_convert.py`.
    """
    found = {f"diffusion_model.{key}{'.set_weight' if key.endswith('_norm.scale') else ''}": (key, ref) for key, ref in tensors.items()}
    sides = [tensors.get(f"img_in.lora_{side}.weight") for side in "BA"]
    if sides[0] is not None and sides[1] is not None:
        size = (sides[0].spec.shape[0], *sides[1].spec.shape[1:])
        found["diffusion_model.img_in.reshape_weight"] = "img_in.lora_A.weight", InMemory(Spec("I64", (len(size),)), pack(size))
    return found


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter in such a file, under its own dotted names. Raises FormatError for tensors that are part of no change."""
    options = options or ReadOptions()
    try:
        bare = _without_root(container.tensors) and not any(key.startswith(ROOTS) for key in container.tensors)
        keyed = _rooted(container.tensors) if bare else {key: (key, ref) for key, ref in container.tensors.items()}
        modules, others = collect({key: ref for key, (_, ref) in keyed.items()}, SPELLINGS)
        for slots in modules.values():
            slots.keys = {slot: keyed[key][0] for slot, key in slots.keys.items()}
        check_unread(container.metadata, modules, options.alpha)
        deltas, faults = made(modules, lambda module, slots: options.alpha)
        faults += [FormatError("no tensor of this family", tensor=keyed[key][0]) for key in others]
        faults += [FormatError("lies under none of the roots", tensor=name) for name in modules if not name.startswith(ROOTS)]
        raise_all(faults)
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    return Adapter(deltas, {"safetensors": dict(container.metadata)}, {}, container.path, NAME, container.files)


# -- writing


def encode(adapter: Adapter) -> Container:
    """The adapter under ComfyUI's dotted names: those of a single-file checkpoint's model, or of a model that stands alone.

    Raises NotExpressible for flat names, which only a base gives back their dots, for other parts of a pipeline, and for what the
    suffixes cannot say.
    """
    faults = passengers(adapter, "ComfyUI's files have")
    if adapter.flat:
        fact, remedy = "where its name has dots only the base tells", "give the base with --base"
        faults += [NotExpressible(fact, tensor=name, remedy=remedy) for name in list(adapter)[:1]]
    raise_all(faults)
    bare = {name for name in adapter if name.rpartition(".")[2] not in ("weight", "bias")}  # parameters that are no module's
    spelt = replace(adapter, deltas={f"{name}.weight" if name in bare else name: delta for name, delta in adapter.items()})
    tensors = spelt_tensors(spelt, _named, {Scaled: "ComfyUI has no (IA)³; --format kohya has"}, _read_otherwise)
    metadata = carried(adapter)
    return Container(tensors, metadata, seal=resealed(metadata))


def _read_otherwise(word: str, delta: Delta) -> None:
    """Refuses what ComfyUI would take from these suffixes for another change than it is."""
    fact = None
    if isinstance(delta, Adjoined) and delta.bm is not None:
        fact = "ComfyUI reads no core of GLoRA"
    elif isinstance(delta, Rotated) and delta.scale is not None:
        fact = "ComfyUI turns a weight and leaves the rows' factors out"
    elif isinstance(delta, Rotated | Butterfly) and delta.bound is not None:
        fact = "ComfyUI bounds a rotation by alpha, where LyCORIS bounds it by alpha times the outputs"
    if fact is not None:
        raise NotExpressible(fact, remedy="--format kohya keeps what was trained, or convert it first: --kind lora")


def _named(module: str) -> str:
    if module.startswith(ROOTS):
        return module
    if module.startswith(_SD1):
        return f"text_encoders.clip_l.transformer.{module.removeprefix(_SD1)}"
    part = next((part for part in PARTS if module.startswith(f"{part}.")), None)
    if not module or part not in (None, "model.diffusion_model"):
        remedy = "--format kohya, which ComfyUI reads too" if module else None
        raise NotExpressible("its name is none that a single-file checkpoint has", expected="diffusion_model.…", remedy=remedy)
    return f"diffusion_model.{module.removeprefix('model.diffusion_model.')}"
