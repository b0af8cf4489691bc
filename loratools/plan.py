"""The plan of a merge, known before a weight is read: which deltas meet which tensor, what is added, what the config will say.

From it follow the changes of a checkpoint's tensors; `merge` writes them, `verify` replays them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from loratools.adapter import Adapter
from loratools.checkpoint import Change, Checkpoint
from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Chain
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.deltas.rows import Rows
from loratools.errors import LoratoolsError, MatchError, QuantizedError, ShapeError, UnsupportedError, UsageError, raise_all
from loratools.families import of_vocabulary
from loratools.statistics import Statistics
from loratools.stream import BLOCK, Applied, apply_blocks, cast_blocks
from loratools.tensorfile import Spec, same_bytes

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


def split_strength(item: str | Path | Adapter) -> tuple[str | Path | Adapter, float]:
    """`path:strength` as (path, strength); an existing path of that very name wins, and no strength is 1.

    >>> split_strength("style:0.5")
    ('style', 0.5)
    """
    if not isinstance(item, str) or Path(item).exists():
        return item, 1.0
    head, colon, tail = item.rpartition(":")
    try:
        strength = float(tail) if colon and head else None
    except ValueError:
        strength = None
    if strength is not None and strength - strength != 0:
        raise UsageError("a strength must be finite", found=item)
    return (head, strength) if strength is not None else (item, 1.0)


def split_renames(texts: Iterable[str]) -> list[tuple[str, str]]:
    """`OLD=NEW` texts as pairs."""
    return [_pair(text) for text in texts]


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals or not old:
        raise UsageError("--rename", found=text, expected="OLD=NEW")
    return old, new


def make_plan(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    untie: bool = False,
    renames: Iterable[tuple[str, str]] = (),
    allow_unmatched: bool = False,
    transposed: tuple[str, ...] = (),
    embeddings: tuple[str, ...] = (),
) -> Plan:
    """Names joined, shapes checked, ties decided: the whole merge but its arithmetic."""
    if checkpoint.quantization:
        remedy = "merge into the original 16- or 32-bit weights"
        remedy += ", or give --dequantize to merge onto a dequantised copy" if checkpoint.dequantizable else ""
        raise QuantizedError("the base's weights are quantised", file=checkpoint.path, found=checkpoint.quantization, remedy=remedy)
    family = checkpoint.family(embeddings, transposed)
    known = dict(checkpoint.specs)
    for embedding, head in family.ties(checkpoint):
        known.setdefault(head, known[embedding])
    plan = Plan()
    for adapter, strength in adapters:
        resolved = adapter.resolve(known, family, renames=renames, allow_unmatched=allow_unmatched)
        plan.notes += [note for note in resolved.notes if note not in plan.notes]
        if adapter.passengers:
            shown = ", ".join([*adapter.passengers][:3]) + (", …" if len(adapter.passengers) > 3 else "")
            plan.notes.append(f"{len(adapter.passengers)} tensors of the adapter change no weight and are left out: {shown}")
        plan.expected += len(resolved) + resolved.left
        for name, delta in resolved.items():
            if strength == 0:
                plan.without_effect += 1
            else:
                plan.changes.setdefault(name, []).append((delta, strength))
    _check_meetings(plan, known)
    _check_places(plan, checkpoint)
    for prefix, part in checkpoint.parts.items():
        inner = plan.within(prefix)
        _settle(inner, part, part.family(embeddings, transposed).tied(part), untie)
        plan.put_back(prefix, inner)
    if checkpoint.single and plan.config:
        plan.notes.append("the output is one file; the config.json it is used with needs " + json.dumps(plan.config))
    return plan


def _check_places(plan: Plan, checkpoint: Checkpoint) -> None:
    """A tensor that is new to a pipeline belongs to one of its models."""
    stray = [name for name in plan.changes if not name.startswith(tuple(checkpoint.parts))]
    fact, expected, remedy = "new, and of no model of the pipeline", ", ".join(checkpoint.parts), "give --rename OLD=NEW"
    raise_all(MatchError(fact, file=checkpoint.path, tensor=name, expected=expected, remedy=remedy) for name in stray)


def _settle(plan: Plan, checkpoint: Checkpoint, tied: tuple[str, str] | None, untie: bool) -> None:
    """What the model that the tensors are of decides: ties, new shapes, vocabularies."""
    if tied:
        _tie(plan, checkpoint, tied, untie)
    _check_shared(plan, checkpoint, untie)
    for name, applications in plan.changes.items():
        _note_shape(plan, checkpoint, name, applications)
    _check_vocabulary(plan, checkpoint)
    _check_rows(plan, checkpoint)


def _replaces(delta: Delta) -> bool:
    """Whether nothing of the base's own tensor is left."""
    return isinstance(delta, Replacement) or (isinstance(delta, Chain) and _replaces(delta.first))


def _grown(name: str, applications: Applications, base: Spec | None) -> list[LoratoolsError]:
    """A weight that grows before it is changed grows once, and as a whole."""
    grows = base is not None and any(delta.spec(base).shape != base.shape for delta, _ in applications)
    if not grows or (len(applications) == 1 and applications[0][1] == 1):
        return []
    found = ", ".join(f"{strength:g}" for _, strength in applications)
    return [ShapeError("a change that makes a tensor of another shape has strength 1 or 0, and meets no other", tensor=name, found=found)]


def _check_meetings(plan: Plan, known: Mapping[str, Spec]) -> None:
    """A whole tensor meets nothing else on its name unless the bytes are equal, and one of another shape has strength 1."""
    faults: list[LoratoolsError] = []
    for name, applications in plan.changes.items():
        saved = [(delta, strength) for delta, strength in applications if _replaces(delta)]
        if not saved:
            faults += _grown(name, applications, known.get(name))
            continue
        first = saved[0][0]
        equal = all(isinstance(d, Replacement) and isinstance(first, Replacement) and same_bytes(d.value, first.value) for d, _ in saved)
        if len(applications) > 1 and not (len(saved) == len(applications) and equal):
            faults.append(MatchError("several adapters change this tensor, and one replaces it whole", tensor=name))
        elif len(applications) > 1 and any(strength != 1 for _, strength in applications):
            found = ", ".join(f"{strength:g}" for _, strength in applications)
            faults.append(MatchError("several adapters replace this tensor alike, which has strength 1", tensor=name, found=found))
        if equal and len(saved) == len(applications):
            plan.changes[name] = applications[:1]
            plan.without_effect += len(applications) - 1
        base = known.get(name)
        if (base is None or first.spec(base).shape != base.shape) and saved[0][1] != 1:
            faults.append(ShapeError("a tensor that is new or of another shape has strength 1 or 0", tensor=name, found=saved[0][1]))
    raise_all(faults)


def _tie(plan: Plan, checkpoint: Checkpoint, tied: tuple[str, str], untie: bool) -> None:
    """Decide a tied embedding and head: alike they stay tied, else it takes `--untie`, which writes both."""
    embedding, head = tied
    _follow(plan, tied)
    here = [name for name in tied if name in plan.changes]
    if not here:
        return
    _share_saved(plan, tied)
    if len(here) == 2 and _alike(plan.changes[embedding], plan.changes[head]):
        if head not in checkpoint:
            plan.without_effect += len(plan.changes.pop(head))
            plan.notes.append(f"{head} stays tied to {embedding}: the adapter changes both alike")
        return
    how = f"{here[0]} alone" if len(here) == 1 else "each in a way of its own"
    if embedding.endswith("shared.weight"):
        raise UnsupportedError(
            f"{embedding} is the embedding of encoder and decoder and, as {head}, the head, and the adapter changes {how}",
            file=checkpoint.path, tensor=here[0], remedy="peft's own forward does not apply that either",
        )  # fmt: skip
    if not untie:
        raise UnsupportedError(
            f"{embedding} and {head} are one tensor in this model, and the adapter changes {how}",
            file=checkpoint.path, tensor=here[0], remedy="give --untie to write both",
        )  # fmt: skip
    plan.config["tie_word_embeddings"] = False
    plan.notes.append(f"untied: {head} is written beside {embedding}")
    bias = head.removesuffix("weight") + "bias"
    # the flag that ties the weights ties the decoder's bias of BERT and its kin to their head's, too
    for name, source in ((head, embedding), (bias, bias.replace("decoder.bias", "bias"))):
        if name not in checkpoint and source in checkpoint and name != source:
            plan.sources[name] = source
            plan.changes.setdefault(name, [])


def _check_shared(plan: Plan, checkpoint: Checkpoint, untie: bool) -> None:
    """Names of one tensor in a pickle are changed alike, or `--untie` makes them tensors of their own."""
    for names in checkpoint.shared:
        here = [name for name in names if name in plan.changes]
        if here and not untie and not all(name in here and _alike(plan.changes[here[0]], plan.changes[name]) for name in names):
            raise UnsupportedError(
                f"one tensor in the base's file under the names {', '.join(names)}, and the adapter changes {', '.join(here)}",
                file=checkpoint.path, tensor=here[0], remedy="give --untie to make each a tensor of its own",
            )  # fmt: skip


def _share_saved(plan: Plan, tied: tuple[str, str]) -> None:
    """Where one of the two is adapted on top of a saved tensor, the other one's base is that tensor too: they are tied."""
    for name, other in (tied, tied[::-1]):
        for delta, strength in plan.changes.get(name, ())[:1]:
            if not isinstance(delta, Chain) or not isinstance(delta.first, Replacement):
                continue
            if other not in plan.changes:
                plan.changes[other] = [(delta.first, strength)]
                plan.expected += 1
            elif not _replaces(plan.changes[other][0][0]):
                then, theirs = plan.changes[other][0]
                plan.changes[other][0] = (Chain(first=delta.first, then=then), theirs)


def _follow(plan: Plan, tied: tuple[str, str]) -> None:
    """What changes a tied embedding as one table with its head changes the head too, after what was saved of it."""
    embedding, head = tied
    following = [(found, strength) for delta, strength in plan.changes.get(embedding, ()) if (found := _following(delta))]
    there = plan.changes.get(head, [])
    if not following or any(_following(delta) for delta, _ in there):
        return
    if len(there) == len(following) == len(plan.changes[embedding]) == 1 and _replaces(there[0][0]):
        plan.changes[head] = [(Chain(first=there[0][0], then=following[0][0]), following[0][1])]
    elif not all(isinstance(delta, Additive) for delta, _ in there):
        raise UnsupportedError(f"trained rows of {embedding} are also those of {head}, which is changed in another way", tensor=head)
    else:  # a difference is added to the rows as to the others
        plan.changes[head] = [*following, *there]
        plan.expected += len(following)


def _following(delta: Delta) -> Delta | None:
    """A change of an embedding that is its tied head's too, apart from a saved tensor beneath it."""
    inner = delta.then if isinstance(delta, Chain) else delta
    return inner if inner.follows_tie else None


def _alike(one: Applications, other: Applications) -> bool:
    if len(one) != len(other):
        return False
    return all(s == t and _same(d, e) for (d, s), (e, t) in zip(one, other, strict=True))


def _same(one: Delta, other: Delta) -> bool:
    """Whether two deltas make the same of the same weight: whole tensors with equal bytes, factors with equal bytes and scaling."""
    if isinstance(one, Replacement) and isinstance(other, Replacement):
        return same_bytes(one.value, other.value)
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return one.scaling == other.scaling and same_bytes(one.A, other.A) and same_bytes(one.B, other.B)
    if isinstance(one, Rows) and isinstance(other, Rows):
        return one.indices == other.indices and same_bytes(one.values, other.values)
    if isinstance(one, Chain) and isinstance(other, Chain):
        return _same(one.first, other.first) and _same(one.then, other.then)
    return False


def _note_shape(plan: Plan, checkpoint: Checkpoint, name: str, applications: Applications) -> None:
    base = checkpoint.specs.get(plan.sources.get(name, name))
    if not applications:
        return
    spec = applications[0][0].spec(base)
    if base is None:
        plan.notes.append(f"added: {name} {spec}, which the base lacks")
    elif spec.shape != base.shape:
        plan.notes.append(f"resized: {name} from {list(base.shape)} to {list(spec.shape)}")
        resized = len(base.shape) == 2 and _vocabulary(checkpoint) == base.shape[0]
        if resized and plan.config.setdefault("vocab_size", spec.shape[0]) != spec.shape[0]:
            raise ShapeError("two vocabularies of different size", tensor=name, found=spec.shape[0], expected=plan.config["vocab_size"])


def _check_vocabulary(plan: Plan, checkpoint: Checkpoint) -> None:
    """With a resized vocabulary, the embedding and the head both have its size, or the model could not be loaded."""
    size = plan.config.get("vocab_size")
    if size is None:
        return
    for name, spec in {**{name: checkpoint.specs[source] for name, source in plan.sources.items()}, **checkpoint.specs}.items():
        changed = plan.changes.get(name)
        new = changed[0][0].spec(spec) if changed else spec
        if (of_vocabulary(name) or name.endswith("predictions.bias")) and spec.shape[0] == _vocabulary(checkpoint) and new.shape[0] != size:
            raise ShapeError(
                "the adapter resizes the vocabulary, and does not save this tensor of it", file=checkpoint.path, tensor=name,
                found=new.shape[0], expected=size, remedy="save the adapter with save_embedding_layers=True",
            )  # fmt: skip


def _check_rows(plan: Plan, checkpoint: Checkpoint) -> None:
    """A weight and a bias of one module that had as many rows still have."""
    faults: list[LoratoolsError] = []
    for name, applications in plan.changes.items():
        module, _, leaf = name.rpartition(".")
        other = f"{module}.{'bias' if leaf == 'weight' else 'weight'}"
        old, beside = checkpoint.specs.get(name), checkpoint.specs.get(other)
        if leaf not in ("weight", "bias") or not applications or old is None or beside is None or old.shape[:1] != beside.shape[:1]:
            continue
        meeting = plan.changes.get(other)
        new, theirs = applications[0][0].spec(old).shape[:1], (meeting[0][0].spec(beside) if meeting else beside).shape[:1]
        if new != theirs and old.shape[:1] != new:
            faults.append(ShapeError(f"changes its rows, and {other} does not", tensor=name, found=list(new), expected=list(theirs)))
    raise_all(faults)


def _vocabulary(checkpoint: Checkpoint) -> Any:
    text = checkpoint.config.get("text_config")
    return {**(text if isinstance(text, dict) else {}), **checkpoint.config}.get("vocab_size")


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
