"""A merge planned: names joined, shapes checked, ties decided, strengths and renames read; everything but its arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.checkpoint import Checkpoint
from loratools.deltas.full import Replacement
from loratools.errors import LoratoolsError, MatchError, QuantizedError, ShapeError, UsageError, raise_all
from loratools.families import of_vocabulary
from loratools.plan import Applications, Plan
from loratools.refs import Spec, same_bytes
from loratools.ties import check_shared, replaces, tie


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
        tie(plan, checkpoint, tied, untie)
    check_shared(plan, checkpoint, untie)
    for name, applications in plan.changes.items():
        _note_shape(plan, checkpoint, name, applications)
    _check_vocabulary(plan, checkpoint)
    _check_rows(plan, checkpoint)


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
        saved = [(delta, strength) for delta, strength in applications if replaces(delta)]
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
