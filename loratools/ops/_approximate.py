"""Adapters subtracted from an output that has no record: near the base, with a bound of how near.

W′ lies within half a unit in the last place of W + ΔW, and what is written within half a unit of W′ − ΔW. For precision p,
half a unit of x is at most 2⁻ᵖ·|x|: no weight is off by more than 2⁻ᵖ·(max|W′| + max|Ŵ|).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools import threads
from loratools.checkpoint import Checkpoint
from loratools.deltas.base import Additive, Delta
from loratools.errors import NotInvertible, UsageError
from loratools.formats import load
from loratools.output import whole
from loratools.plan import Plan, changes_of
from loratools.planning import make_plan, split_strength
from loratools.receipt import Receipt, adapter_inputs, checkpoint_input, history_of, receipt_path
from loratools.refs import Buffer, Spec
from loratools.rewrite import Change, Seen
from loratools.statistics import Statistics
from loratools.tensors import as_tensor, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


def approximate(merged: Checkpoint, target: Path, adapters: Sequence[str | Path], receipt: Receipt, workers: int) -> dict[str, Any]:
    """Subtract adapters, given with the strengths they were merged at. Raises NotInvertible for what is no sum."""
    if not adapters:
        raise UsageError("--approximate needs the adapters that were merged", remedy="give each with --adapter, its strength included")
    given = [(load(str(path)), strength) for path, strength in map(split_strength, adapters)]
    plan = make_plan(merged, [(adapter, -strength) for adapter, strength in given])
    _check_sums(merged, plan)
    statistics: dict[str, Statistics] = {}
    largest: dict[str, _Largest] = {}
    changes, added = changes_of(merged, plan, statistics)
    assert not added  # only what replaces a tensor whole adds one, and that was refused
    watched = {name: _watched(name, change, largest) for name, change in changes.items()}
    with whole(target) as place, threads.single_threaded_blas():
        done = merged.rewrite(place, watched, workers=workers)
        receipt.inputs = [checkpoint_input(merged, "merged", done.read)] + [row for adapter, _ in given for row in adapter_inputs(adapter)]
        receipt.outputs, receipt.digests, receipt.left_out = done.files, done.written, done.left_out
        receipt.expected = plan.expected
        receipt.applied = plan.without_effect + sum(statistic.applied for statistic in statistics.values())
        receipt.tensors = [statistic.row(name) | {"off_by": largest[name].bound} for name, statistic in statistics.items()]
        worst = max(largest, key=lambda name: largest[name].bound, default=None)
        told = f"by up to {largest[worst].bound:.3g} ({worst})" if worst else "nowhere"
        receipt.notes = [*plan.notes, f"subtracted, not restored: a weight can differ from the original {told}"]
        receipt.history = history_of(merged)
        receipt.write(receipt_path(place, folder=not merged.single))
    return receipt.as_json()


def _check_sums(merged: Checkpoint, plan: Plan) -> None:
    others = [(name, delta.called) for name, applications in plan.changes.items() for delta, _ in applications if not _is_sum(delta)]
    if others:
        name, called = others[0]
        raise NotInvertible(
            f"{called} delta cannot be taken off by subtracting", file=merged.path, tensor=name,
            found=f"changes of {len(others)} tensors that are no sums", remedy="only a record can undo it: merge with --reversible",
        )  # fmt: skip


def _is_sum(delta: Delta) -> bool:
    """Whether it adds the same to whatever weight it meets."""
    inner = getattr(delta, "members", None) or (getattr(delta, "delta", None),)
    parts = [part for part in inner if part is not None]
    return isinstance(delta, Additive) or (bool(parts) and all(_is_sum(part) for part in parts))


@dataclass
class _Largest:
    """max|W′| + max|Ŵ| of a tensor, and the half unit in the last place that this makes."""

    spec: Spec
    before: float = 0.0
    after: float = 0.0

    @property
    def bound(self) -> float:
        import torch

        # half of eps is 2⁻ᵖ; below the smallest normal number units are that of the smallest
        kind = torch.finfo(torch_dtype(self.spec.dtype))
        return kind.eps / 2 * (max(self.before, kind.tiny) + max(self.after, kind.tiny))


def _watched(name: str, change: Change, largest: dict[str, _Largest]) -> Change:
    """The same change, the largest number read and written noted."""
    seen_most = largest[name] = _Largest(change.spec)

    def blocks(seen: Seen) -> Iterator[Buffer]:
        def both(block: Buffer) -> None:
            seen(block)
            seen_most.before = max(seen_most.before, _most(block, change.spec))

        for block in change.blocks(both):
            seen_most.after = max(seen_most.after, _most(block, change.spec))
            yield block

    return Change(change.spec, blocks)


def _most(block: Buffer, spec: Spec) -> float:
    import torch

    size = memoryview(block).nbytes * spec.numel // max(1, spec.nbytes)
    values: Tensor = as_tensor(bytearray(block), Spec(spec.dtype, (size,))).to(torch.float32 if spec.dtype != "F64" else torch.float64)
    return float(values.abs().max()) if size else 0.0

