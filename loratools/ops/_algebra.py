"""What the operations on adapters alone share: reading one, the LoRA inside a delta, and writing the result with its receipt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.compress import rounded
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.deltas.residual import INITS
from loratools.errors import UnsupportedError
from loratools.formats import FORMATS, encode, load
from loratools.formats.base import ReadOptions
from loratools.formats.writing import write_container
from loratools.output import sync_tree, whole
from loratools.receipt import Receipt, adapter_history, adapter_inputs, add_sha256, receipt_path
from loratools.sidefiles import file_entry
from loratools.tensorfile import TensorFile
from loratools.tensors import read_tensor
from loratools.threads import Background

SAME = 2.0**-50  # two ways to compute one scaling differ by a few units in the last place


def loaded(adapter: str | Path | Adapter, options: ReadOptions) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else load(adapter, options=options)


def label(adapter: str | Path | Adapter) -> str:
    return f"<adapter of {len(adapter)} deltas>" if isinstance(adapter, Adapter) else str(adapter)


def low_of(delta: Delta) -> LowRank | None:
    """The LoRA in a delta: itself, a DoRA's direction, what comes after a saved tensor; None if there is none.

    Raises UnsupportedError for a kind that holds low-rank parts this does not reach into.
    """
    if isinstance(delta, LowRank):
        return delta
    if isinstance(delta, DoRA):
        return low_of(delta.direction)
    if isinstance(delta, Chain):
        return low_of(delta.then)
    if delta.kind in ("full", "replacement", "rows"):
        return None
    moved = delta.kind in INITS
    remedy = "give the adapter as it was initialised with --initial" if moved else "convert it first"
    raise UnsupportedError(f"{delta.called} delta has no LoRA to work on", remedy=remedy)


def rank_of(delta: Delta) -> int | None:
    """The rank of the LoRA in a delta, None for one of a kind without."""
    if isinstance(delta, DoRA | Chain):
        return rank_of(delta.direction if isinstance(delta, DoRA) else delta.then)
    return delta.rank if isinstance(delta, LowRank) else None


def with_low(delta: Delta, low: LowRank) -> Delta:
    """The delta with another LoRA in the place of its own."""
    if isinstance(delta, DoRA):
        return replace(delta, direction=low)
    if isinstance(delta, Chain):
        return replace(delta, then=with_low(delta.then, low))
    return low


def bias_of(name: str, deltas: Mapping[str, Delta]) -> LowRank | None:
    """The LoRA whose scaling a bias difference shares, as formats with a `lora_B.bias` have it; None for any other tensor."""
    module, _, leaf = name.rpartition(".")
    weight = deltas.get(f"{module}.weight")
    return low_of(weight) if leaf == "bias" and weight is not None else None


def scaled_to(full: Full, scaling: float, strength: float = 1.0) -> tuple[Full, float]:
    """strength · the same difference under another scaling, and the relative error of what rounding it cost."""
    import torch

    wanted = full.scale * strength
    if scaling == 0:
        return replace(full, scale=0.0), 0.0
    factor = wanted / scaling
    if abs(factor - 1) <= SAME:
        return replace(full, scale=scaling), 0.0
    exact = read_tensor(full.diff, torch.float64) * factor
    stored = rounded(exact, full.diff.spec.dtype)
    return Full(diff=stored, scale=scaling), relative(read_tensor(stored, torch.float64) - exact, exact)


def relative(part: Any, of: Any) -> float:
    """‖part‖ / ‖of‖, 0 for nothing of nothing."""
    import torch

    norm = float(torch.linalg.vector_norm(of))
    return float(torch.linalg.vector_norm(part)) / norm if norm else 0.0


def shares(norms: Sequence[float]) -> list[float | None]:
    """Each norm's square as a share of all."""
    total = math.fsum(norm**2 for norm in norms)
    return [norm**2 / total if total else None for norm in norms]


def format_of(given: str | None, adapter: Adapter) -> str:
    """The format asked for, else the one it was read from where that can be written, else peft."""
    written = [row.name for row in FORMATS if row.encode]
    return given or (adapter.format if adapter.format in written else None) or "peft"


def write(receipt: Receipt, adapter: Adapter, inputs: Sequence[Adapter], target: Path, format: str, *, sha256: bool) -> dict[str, Any]:
    """The adapter and its receipt at `target`, whole or not at all; returns the receipt."""
    encoded = encode(adapter, format)
    receipt.notes = [*receipt.notes, *encoded.notes]
    with whole(target) as place:
        receipt.digests = write_container(encoded, place)
        fill_files(receipt, place, inputs)
        receipt.history = [entry for one in inputs for entry in adapter_history(one)]
        if sha256:
            add_sha256(receipt.outputs, place if place.is_dir() else place.parent)
            add_sha256(receipt.inputs, None)
        receipt.write(receipt_path(place, folder=place.is_dir()))
    return receipt.as_json()


def fill_files(receipt: Receipt, place: Path, inputs: Iterable[Adapter] = ()) -> None:
    """The receipt's rows of the files at an output, before it is written itself, and of the adapters that went in.

    Both are digested side by side, while what was written goes to the disk.
    """
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    with Background() as syncing, ThreadPoolExecutor(1) as beside:
        syncing.start(partial(sync_tree, place))
        given = beside.submit(lambda: [row for one in inputs for row in adapter_inputs(one)])
        receipt.outputs = [_output(path) for path in files]
        receipt.inputs += given.result()


def _output(path: Path) -> dict[str, Any]:
    header = TensorFile(path).header_sha256 if path.suffix == ".safetensors" else None
    return {**file_entry(path, path.name), "header_sha256": header}
