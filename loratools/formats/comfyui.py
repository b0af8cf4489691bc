"""ComfyUI and BFL: dotted names under `diffusion_model.` or `text_encoders.`, with kohya's, LyCORIS' or peft's suffixes.

Also whole differences `.diff` and `.diff_b`, replacements `.set_weight`. Without an alpha the scale is 1. Read from ComfyUI
`comfy/lora.py` and `comfy/weight_adapter/`.
"""

from __future__ import annotations

from loratools.adapter import Adapter
from loratools.deltas.adjoined import Adjoined
from loratools.deltas.base import Delta
from loratools.deltas.butterfly import Butterfly
from loratools.deltas.rotated import Rotated
from loratools.deltas.scaled import Scaled
from loratools.errors import FormatError, LoratoolsError, NotExpressible, raise_all
from loratools.flatnames import PARTS
from loratools.formats._digests import resealed
from loratools.formats._scale import ALPHA
from loratools.formats._slots import SPELLINGS, collect, made
from loratools.formats._spelt import carried, spelt_tensors
from loratools.formats._unread import check_unread
from loratools.formats.base import Container, ReadOptions

NAME = "comfyui"
ROOTS = ("diffusion_model.", "text_encoders.")

_SD1 = "cond_stage_model.transformer."  # its only text encoder in single-file checkpoints


def detect(container: Container) -> bool:
    """Whether its modules lie under `diffusion_model.` or `text_encoders.` and end as changes of them do, in no file of loralib's."""
    if container.config is not None or ALPHA in container.metadata:
        return False
    return any(key.startswith(ROOTS) and SPELLINGS.fullmatch(key) for key in container.tensors)


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter in such a file, under its own dotted names. Raises FormatError for tensors that are part of no change."""
    options = options or ReadOptions()
    try:
        modules, others = collect(container.tensors, SPELLINGS)
        check_unread(container.metadata, modules, options.alpha)
        deltas, faults = made(modules, lambda module, slots: options.alpha)
        faults += [FormatError("no tensor of this family", tensor=key) for key in others]
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
    faults: list[LoratoolsError] = [NotExpressible("ComfyUI's files have no place for it", tensor=name) for name in adapter.passengers]
    if adapter.flat:
        fact, remedy = "where its name has dots only the base tells", "give the base with --base"
        faults += [NotExpressible(fact, tensor=name, remedy=remedy) for name in list(adapter)[:1]]
    raise_all(faults)
    tensors = spelt_tensors(adapter, _named, {Scaled: "ComfyUI has no (IA)³; --format kohya has"}, _read_otherwise)
    return Container(tensors, carried(adapter), sealed=resealed)


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
