"""merge: a base with adapters in it, streamed: each weight read once, changed in float64, rounded once, written.

    W′ = W + Σ sᵢ·(applyᵢ(W) − W)

for adapters applied at strengths sᵢ: one at strength 1 is exactly its own W′, one at 0 leaves the base's bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from loratools import threads
from loratools.adapter import Adapter
from loratools.checkpoint import Change, Checkpoint, Rewritten
from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.errors import LoratoolsError, MatchError, OptionError, QuantizedError, ShapeError, UnsupportedError, raise_all
from loratools.families import Family
from loratools.formats import load
from loratools.formats.base import ReadOptions
from loratools.output import check_output, whole
from loratools.receipt import Receipt, adapter_inputs, add_sha256, checkpoint_input, history_of, receipt_path
from loratools.stream import BLOCK, Applied, Statistics, apply_blocks, cast_blocks
from loratools.tensorfile import Ref, Spec
from loratools.tensors import dtype_code

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


def merge(
    base: str | Path,
    adapters: str | Path | Adapter | Sequence[str | Path | Adapter],
    out: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    untie: bool = False,
    rename: Sequence[str] = (),
    allow_unmatched: bool = False,
    alpha_in: float | None = None,
    transposed: Sequence[str] = (),
    embedding: Sequence[str] = (),
    full_report: bool = False,
    sha256: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Merge adapters (`path` or `path:strength`) into a base checkpoint; returns the receipt.

    Every tensor keeps its dtype unless `dtype` names another. Raises, before anything is visible at `out`, MatchError for
    deltas the base lacks, ShapeError, QuantizedError, NonFiniteError for a weight that overflows, UnsupportedError for a
    delta on a tied tensor without `untie`.

    >>> receipt = merge("base/", ["adapter/", "style/:0.5"], "out/")  # doctest: +SKIP
    >>> receipt["applied"] == receipt["expected"]  # doctest: +SKIP
    True
    """
    arguments = {name: value for name, value in locals().items() if name not in ("base", "adapters", "out")}
    listed = [adapters] if isinstance(adapters, str | Path | Adapter) else list(adapters)
    given = [split_strength(item) for item in listed]
    paths = [item for item, _ in given if not isinstance(item, Adapter)]
    target = check_output(out, overwrite=overwrite, inputs=[base, *paths])
    receipt = Receipt("merge", {"base": str(base), "adapters": [_label(item) for item in listed], "out": str(out), **arguments})
    options = ReadOptions(alpha=alpha_in, transposed=tuple(transposed), embeddings=tuple(embedding))
    checkpoint = Checkpoint(base)
    loaded = [(item if isinstance(item, Adapter) else load(item, options=options), strength) for item, strength in given]
    plan = make_plan(
        checkpoint, loaded, untie=untie, renames=[_pair(text) for text in rename], allow_unmatched=allow_unmatched,
        transposed=tuple(transposed), embeddings=tuple(embedding),
    )  # fmt: skip
    code = dtype_code(dtype) if dtype else None
    statistics: dict[str, Statistics] = {}
    changes, added = changes_of(checkpoint, plan, statistics, dtype=code, device=device, full=full_report)
    if code:
        plan.config |= {key: _TORCH[code] for key in ("torch_dtype", "dtype") if key in checkpoint.config}
    with whole(target) as place:
        done = _rewrite(checkpoint, place, changes, added, plan, device, threads)
        _fill(receipt, checkpoint, [adapter for adapter, _ in loaded], plan, statistics, done)
        if sha256:
            add_sha256(receipt.outputs, place.parent if checkpoint.single else place)
            add_sha256(receipt.inputs, None)
        receipt.write(receipt_path(place, folder=not checkpoint.single))
    return receipt.as_json()


_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
        raise OptionError("a strength must be finite", found=item)
    return (head, strength) if strength is not None else (item, 1.0)


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals or not old:
        raise OptionError("--rename", found=text, expected="OLD=NEW")
    return old, new


def _label(item: str | Path | Adapter) -> str:
    return f"<adapter of {len(item)} deltas>" if isinstance(item, Adapter) else str(item)


# -- the plan


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
        raise QuantizedError(
            "the base's weights are quantised", file=checkpoint.path, found=checkpoint.quantization,
            remedy="merge into the original 16- or 32-bit weights",
        )  # fmt: skip
    family = Family(checkpoint.config, embeddings, transposed)
    tied = family.tied(checkpoint)
    known = dict(checkpoint.specs)
    if tied and tied[1] not in known:
        known[tied[1]] = known[tied[0]]
    plan = Plan()
    for adapter, strength in adapters:
        resolved = adapter.resolve(known, family, renames=renames, allow_unmatched=allow_unmatched)
        plan.notes += [note for note in resolved.notes if note not in plan.notes]
        plan.expected += len(adapter)
        for name, delta in resolved.items():
            if strength == 0:
                plan.without_effect += 1
            else:
                plan.changes.setdefault(name, []).append((delta, strength))
    _check_meetings(plan, known)
    if tied:
        _tie(plan, checkpoint, tied, untie)
    for name, applications in plan.changes.items():
        _note_shape(plan, checkpoint, name, applications, tied)
    return plan


def _check_meetings(plan: Plan, known: Mapping[str, Spec]) -> None:
    """A whole tensor meets nothing else on its name unless the bytes are equal, and one of another shape has strength 1."""
    faults: list[LoratoolsError] = []
    for name, applications in plan.changes.items():
        saved = [(delta, strength) for delta, strength in applications if not delta.needs_base]
        if not saved:
            continue
        first = saved[0][0]
        equal = all(isinstance(d, Replacement) and isinstance(first, Replacement) and same_bytes(d.value, first.value) for d, _ in saved)
        if len(applications) > 1 and not (len(saved) == len(applications) and equal):
            faults.append(MatchError("several adapters change this tensor, and one replaces it whole", tensor=name))
        if equal and len(saved) == len(applications):
            plan.changes[name] = applications[:1]
            plan.without_effect += len(applications) - 1
        base = known.get(name)
        if (base is None or first.spec(base).shape != base.shape) and saved[0][1] != 1:
            faults.append(ShapeError("a tensor that is new or of another shape has strength 1 or 0", tensor=name, found=saved[0][1]))
    raise_all(faults)


def same_bytes(one: Ref, other: Ref) -> bool:
    """Whether two tensors have the same spec and bytes."""
    if one.spec != other.spec:
        return False
    return all(bytes(a) == bytes(b) for a, b in zip(one.blocks(), other.blocks(), strict=True))


def _tie(plan: Plan, checkpoint: Checkpoint, tied: tuple[str, str], untie: bool) -> None:
    """Decide a tied embedding and head: alike they stay tied, else it takes `--untie`, which writes both."""
    embedding, head = tied
    here = [name for name in tied if name in plan.changes]
    if not here:
        return
    if len(here) == 2 and _alike(plan.changes[embedding], plan.changes[head]):
        if head not in checkpoint:
            plan.without_effect += len(plan.changes.pop(head))
            plan.notes.append(f"{head} stays tied to {embedding}: the adapter saved both alike")
        return
    if not untie:
        raise UnsupportedError(
            f"{embedding} and {head} are one tensor in this model, and the adapter changes {' and '.join(here)} alone",
            file=checkpoint.path, tensor=here[0], remedy="give --untie to write both",
        )  # fmt: skip
    plan.config["tie_word_embeddings"] = False
    plan.notes.append(f"untied: {head} is written beside {embedding}")
    if head not in checkpoint:
        plan.sources[head] = embedding
        plan.changes.setdefault(head, [])


def _alike(one: Applications, other: Applications) -> bool:
    if len(one) != len(other):
        return False
    pairs = list(zip(one, other, strict=True))
    return all(s == t and isinstance(d, Replacement) and isinstance(e, Replacement) and same_bytes(d.value, e.value) for (d, s), (e, t) in pairs)


def _note_shape(plan: Plan, checkpoint: Checkpoint, name: str, applications: Applications, tied: tuple[str, str] | None) -> None:
    base = checkpoint.specs.get(plan.sources.get(name, name))
    if not applications:
        return
    spec = applications[0][0].spec(base)
    if base is None:
        plan.notes.append(f"added: {name} {spec}, which the base lacks")
    elif spec.shape != base.shape:
        plan.notes.append(f"resized: {name} from {list(base.shape)} to {list(spec.shape)}")
        text = checkpoint.config.get("text_config")
        stated = {**(text if isinstance(text, dict) else {}), **checkpoint.config}.get("vocab_size")
        if len(base.shape) == 2 and stated == base.shape[0]:
            if plan.config.setdefault("vocab_size", spec.shape[0]) != spec.shape[0]:
                raise ShapeError("two vocabularies of different size", tensor=name, found=spec.shape[0], expected=plan.config["vocab_size"])


# -- carrying it out


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
        applied = Applied(source, target, tuple(applications), device, block)
        place = changes if name in checkpoint else added
        place[name] = Change(target, partial(apply_blocks, applied, statistics[name]))
    if dtype:
        for name, ref in checkpoint.items():
            if name not in changes and ref.spec.floating and ref.spec.dtype != dtype:
                target = Spec(dtype, ref.spec.shape)
                changes[name] = Change(target, partial(cast_blocks, ref, target, block))
    return changes, added


def _rewrite(
    checkpoint: Checkpoint, place: Path, changes: Mapping[str, Change], added: Mapping[str, Change], plan: Plan, device: str, workers: int | None
) -> Rewritten:
    count = workers or (1 if device != "cpu" else threads.default_threads())
    if count < 1:
        raise OptionError("--threads", found=count, expected="at least 1")
    if checkpoint.single and place.suffix != ".safetensors":
        raise OptionError("a base that is one file gives one file", found=place.name, expected="OUT with the ending .safetensors")
    with threads.single_threaded_blas(count > 1):
        return checkpoint.rewrite(place, changes, added=added, config=plan.config, workers=count)


def _fill(
    receipt: Receipt, checkpoint: Checkpoint, adapters: Sequence[Adapter], plan: Plan, statistics: Mapping[str, Statistics], done: Rewritten
) -> None:
    receipt.inputs = [checkpoint_input(checkpoint, "base", done.read)] + [row for adapter in adapters for row in adapter_inputs(adapter)]
    receipt.outputs, receipt.digests = done.files, done.written
    receipt.expected = plan.expected
    receipt.applied = plan.without_effect + sum(statistic.applied for statistic in statistics.values())
    receipt.tensors = [statistic.row(name) for name, statistic in statistics.items()]
    receipt.left_out, receipt.changed_files, receipt.notes = done.left_out, done.changed_files, plan.notes
    receipt.history = history_of(checkpoint)
