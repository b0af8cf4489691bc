"""Writing Megatron-Bridge's adapters: a state dict beside its `run_config.yaml` and the model's config.json.

Plain LoRA is its canonical one, of q, k, v, gate and up each by itself; its DoRA knows fused weights alone, whose slots share linear_in.
Read from Megatron-Bridge's `peft/canonical_lora.py` and `peft/dora.py`; spec/formats/nemo.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from loratools.adapter import Adapter
from loratools.deltas.dora import DoRA
from loratools.errors import LoratoolsError, NotExpressible, OptionError
from loratools.formats._heads import Heads, rows_of
from loratools.formats._pieces import Piece, same, together
from loratools.formats._refused import BAKE, RESIZE
from loratools.formats._scale import only
from loratools.formats._sides import write_yaml
from loratools.formats._trainer import Module, modules_of
from loratools.formats.base import Container
from loratools.formats.nemo import NAME
from loratools.formats.nemo_files import RUN, run_config
from loratools.formats.writing import write_tensors
from loratools.layouts.trainers import Row
from loratools.refs import Ref

FILE = "adapter_model.safetensors"
_ONE = "Megatron-Bridge has one {0} for all modules"
_REMEDY = "convert --kind lora --base"


def encode(adapter: Adapter) -> Container:
    """The adapter as a state dict of Megatron-Bridge's canonical LoRA, or of its DoRA, with its `run_config.yaml`.

    Raises NotExpressible for other kinds, ranks and alphas that differ, tensors that it has no LoRA on, DoRA beside LoRA, and DoRA of
    slots of a fused weight that share no factor; AmbiguousError for rows of those whose heads nothing tells.
    """
    fused = any(isinstance(delta, DoRA) for delta in adapter.values())
    lone = next((name for name, delta in adapter.items() if fused and not isinstance(delta, DoRA)), None)
    if lone is not None:
        fact, remedy = "Megatron-Bridge's DoRA is of all modules, and this is none", "convert --kind dora, or lora, makes all of it one"
        raise NotExpressible(fact, file=adapter.path, tensor=lone, remedy=remedy)
    modules, heads, _ = modules_of(adapter, NAME, want=_fused if fused else _canonical)
    tensors: dict[str, Ref] = {}
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for module in modules:
        piece, tensor = _piece(module, heads), module.tensors[min(module.tensors)]
        tensors |= {f"{module.name}.linear_in.weight": piece.A, f"{module.name}.linear_out.weight": piece.B}
        tensors |= {} if piece.magnitude is None else {f"{module.name}.weight_magnitude": piece.magnitude}
        ranks[tensor], alphas[tensor] = float(piece.rank), piece.alpha
    rank = int(only(ranks, _ONE.format("rank"), RESIZE))
    run = run_config(rank, only(alphas, _ONE.format("alpha"), BAKE), [module.name for module in modules], dora=fused)
    model = dict(adapter.model)

    def write(container: Container, folder: Path) -> dict[str, str]:
        if folder.suffix in (".safetensors", ".pt", ".ckpt", ".nemo"):
            expected = "OUT without an ending, for a folder"
            raise OptionError("this format is written as a folder of weights and a config", found=folder.name, expected=expected)
        folder.mkdir(exist_ok=True)
        digests = write_tensors(folder / FILE, container)
        write_yaml(folder / RUN, run)
        if model:
            (folder / "config.json").write_text(json.dumps(model, indent=2) + "\n", encoding="utf-8")
        return digests

    return Container(tensors, {"format": "pt"}, name=FILE, beside={RUN: run, "config.json": model}, writer=write)


def _fused(row: Row) -> bool:
    return re.search(r"\.adapter_\w+$", row.module) is None


def _canonical(row: Row) -> bool:
    return row.order not in ("grouped", "halves")


def _piece(module: Module, heads: Heads | None) -> Piece:
    """A module's change, of the slots of a fused one together. Raises NotExpressible where they are not all there or share no factor."""
    pieces, first = module.pieces, min(module.pieces)
    if len(module.row.leaves) == 1:
        return pieces[first]
    fact = "Megatron-Bridge has DoRA on fused weights alone, whose slots share a factor"
    apart = next((slot for slot in pieces if pieces[slot].alpha != pieces[first].alpha or not same(pieces[slot].A, pieces[first].A)), None)
    if apart is not None or len(pieces) < len(module.row.leaves):
        lacking = [leaf.name for slot, leaf in enumerate(module.row.leaves) if slot not in pieces]
        found = f"none of {lacking[0].rpartition('.')[2]}" if lacking else None
        raise NotExpressible(fact, tensor=module.tensors[first if apart is None else apart], found=found, remedy=_REMEDY)
    total = sum(piece.rows for piece in pieces.values())
    try:
        placed = [(piece, rows_of(module.row.order, slot, total, heads)) for slot, piece in sorted(pieces.items())]
    except LoratoolsError as error:
        raise error.at(tensor=module.tensors[first]) from None
    return together(placed, total)
