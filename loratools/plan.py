"""The plan of a merge, known before a weight is read: which deltas meet which tensor, what is added, what the config will say.

`planning` makes it; from it follow the changes of a checkpoint's tensors, which `merge` writes and `verify` replays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from loratools.checkpoint import Checkpoint
from loratools.deltas.base import Delta
from loratools.errors import LoratoolsError, MatchError
from loratools.refs import Spec
from loratools.rewrite import Change
from loratools.statistics import Statistics
from loratools.stream import BLOCK, Applied, apply_blocks, cast_blocks

Applications: TypeAlias = list[tuple[Delta, float]]


@dataclass
class Plan:
    """What becomes of each tensor, known before a weight is read: deltas with strengths, tensors added, config keys."""

    changes: dict[str, Applications] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    expected: int = 0
    without_effect: int = 0  # deltas at strength 0, saved twice alike, or of a head that stays tied

    def within(self, prefix: str) -> Plan:
        """The plan of one model of a pipeline, under the model's own names; a plain model's is the plan itself."""
        if not prefix:
            return self
        return Plan({name.removeprefix(prefix): found for name, found in self.changes.items() if name.startswith(prefix)})

    def put_back(self, prefix: str, inner: Plan) -> None:
        """Take over what was decided for that model."""
        if inner is self:
            return
        self.changes = {name: found for name, found in self.changes.items() if not name.startswith(prefix)}
        self.changes |= {prefix + name: found for name, found in inner.changes.items()}
        self.sources |= {prefix + name: prefix + source for name, source in inner.sources.items()}
        self.config |= {prefix + key: value for key, value in inner.config.items()}
        self.notes += [f"{prefix.rstrip('.')}: {note}" for note in inner.notes]
        self.expected += inner.expected
        self.without_effect += inner.without_effect


def supplied(name: str, delta: Delta, checkpoint: Checkpoint) -> Delta:
    """A delta with the base's other tensors that it reads. Raises MatchError where the base lacks one."""
    if not delta.beside:
        return delta
    others = {leaf: f"{name.rpartition('.')[0]}.{leaf}" for leaf in delta.beside}
    lacking = [other for other in others.values() if other not in checkpoint]
    if lacking:
        raise MatchError(f"its change of {name} reads this tensor, which the base lacks", file=checkpoint.path, tensor=lacking[0])
    try:
        return delta.supplied({leaf: checkpoint[other] for leaf, other in others.items()})
    except LoratoolsError as error:
        raise error.at(file=checkpoint.path, tensor=name) from None


def changes_of(
    checkpoint: Checkpoint,
    plan: Plan,
    statistics: dict[str, Statistics],
    *,
    dtype: str | None = None,
    device: str = "cpu",
    full: bool = False,
    block: int = BLOCK,
) -> tuple[dict[str, Change], dict[str, Change]]:
    """The plan as changes of the checkpoint's tensors and tensors added to it; statistics fill as the blocks pass."""
    changes: dict[str, Change] = {}
    added: dict[str, Change] = {}
    for name, applications in plan.changes.items():
        source = checkpoint.get(plan.sources.get(name, name))
        spec = applications[0][0].spec(source.spec if source else None) if applications else source.spec if source else None
        assert spec is not None
        target = Spec(dtype, spec.shape) if dtype and spec.floating else spec
        statistics[name] = Statistics(kinds=tuple(delta.kind for delta, _ in applications), full=full)
        terms = tuple((supplied(name, delta, checkpoint), strength) for delta, strength in applications)
        applied = Applied(source, target, terms, device, block)
        place = changes if name in checkpoint else added
        place[name] = Change(target, partial(apply_blocks, applied, statistics[name]))
    if dtype:
        for name, ref in checkpoint.items():
            if name not in changes and ref.spec.floating and ref.spec.dtype != dtype:
                target = Spec(dtype, ref.spec.shape)
                changes[name] = Change(target, partial(cast_blocks, ref, target, block))
    return changes, added
