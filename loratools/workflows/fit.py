"""fit: an adapter as a runtime takes it, with the error of every tensor beside the best possible; `check` finds nothing in what it writes.

What must be done is what the target's rules say of it (`workflows/targets/`): made LoRA, one scaling, other ranks, a file apart. What
nothing can be done about is NotExpressible with its reason, all of it at once and before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from loratools import threads as workers
from loratools.adapter import Adapter
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, NotExpressible, OptionError, UnsupportedError, raise_all
from loratools.formats import FORMATS, encode, load
from loratools.formats.base import Container, read_options
from loratools.formats.opening import open_container
from loratools.formats.peft_config import CARRIED
from loratools.formats.reading import Reading, arguments, paths, reads
from loratools.formats.writing import write_container
from loratools.ops._algebra import fill_files, label, loaded
from loratools.ops._base import Base
from loratools.output import check_output, whole
from loratools.receipt import Receipt, adapter_history, receipt_path
from loratools.workflows._checking import Strike, lost, strikes, subject_of
from loratools.workflows._fitting import Fitted, levelled, made_lora, rows_of, size_of, split
from loratools.workflows._placing import encoded_for, in_memory, own_names, placed, zeros
from loratools.workflows._subject import WHOLE
from loratools.workflows.targets import Target, target_of


@reads
def fit(
    adapter: str | Path | Adapter,
    out: str | Path,
    target: str,
    *,
    max_rank: int | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Write an adapter as a runtime takes it; returns the receipt, whose rows have each tensor's error beside the best at its rank.

    `target` is peft, vllm, sglang, llama.cpp, mlx, diffusers, comfyui or kohya. `max_rank` bounds every rank, by the best truncation.
    `base`, the checkpoint it belongs to, is needed for what only the weights tell: DoRA as LoRA, dotted names. Saved modules and
    biases that the runtime has no place for go into OUT.saved.safetensors, to be merged into the base. Raises OptionError for a
    target or rank there is not, NotExpressible for what the runtime cannot take in any way, UnsupportedError where a base is needed,
    and what reading and `Adapter.resolve` raise.

    >>> receipt = fit("adapter/", "served/", "vllm", max_rank=16)  # doctest: +SKIP
    >>> check("served/", "vllm")["clean"]  # doctest: +SKIP
    True
    """
    words = arguments(locals(), "adapter", "out")
    chosen = target_of(target)
    if max_rank is not None and (type(max_rank) is not int or max_rank < 1):
        raise OptionError("--max-rank", found=max_rank, expected="a whole number of at least 1")
    if chosen.format not in [row.name for row in FORMATS if row.encode]:
        raise NotExpressible(f"{chosen.title} loads the format {chosen.format}, which this version does not write")
    place_at = check_output(out, overwrite=overwrite, inputs=paths(reading, [adapter], base))
    receipt = Receipt("fit", {"adapter": label(adapter), "out": str(out), **words})
    source = loaded(adapter, read_options(reading))
    on = None if base is None else Base(base, reading)
    work = _Fit(source, on, chosen, max_rank)
    try:
        with workers.single_threaded_blas():
            work.run()
    except LoratoolsError as error:
        raise error.at(file=source.path) from None
    saved = _saved_at(place_at)
    if work.apart:
        check_output(saved, overwrite=overwrite, inputs=paths(reading, [adapter], base))
    encoded = work.encoded()
    beside = encode(work.away, "loratools") if work.apart else None
    with whole(place_at) as place:
        receipt.digests = write_container(encoded, place)
        work.prove(place)
        receipt.tensors, receipt.notes = work.rows(), [*source.notes, *work.notes(saved), *encoded.notes]
        reasons = {name: f"{why} It is in {saved.name}." for name, why in work.apart.items()}
        receipt.left_out = [{"name": name, "reason": why, "relative_norm": None} for name, why in reasons.items()]
        fill_files(receipt, place, [source])
        receipt.inputs += [on.input(workers.default_threads())] if on is not None else []
        receipt.history = adapter_history(source)
        receipt.expected, receipt.applied = len(source), len(work.made) - len(work.beside)
        if beside is not None:
            _write_beside(beside, place.parent / saved.name, receipt)
        receipt.write(receipt_path(place, folder=place.is_dir()))
    return receipt.as_json()


def _saved_at(out: Path) -> Path:
    """Where what goes apart is written: beside the output, for some runtimes load every file of a folder."""
    name = out.stem if out.suffix in (".safetensors", ".gguf") else out.name
    return out.parent / f"{name}.saved.safetensors"


def _write_beside(container: Container, place: Path, receipt: Receipt) -> None:
    """The file of what goes apart, with a receipt of its own."""
    own = Receipt("fit", receipt.arguments, inputs=receipt.inputs, history=receipt.history, started=receipt.started)
    own.digests = write_container(container, place)
    fill_files(own, place)
    own.expected, own.applied = receipt.expected, receipt.expected - receipt.applied
    own.write(receipt_path(place, folder=False))


class _Fit:
    """An adapter on its way: what the rules struck, what stays and what goes, and the deltas as they will be written."""

    def __init__(self, source: Adapter, base: Base | None, target: Target, max_rank: int | None) -> None:
        self.source, self.base, self.target = source, base, target
        limits = [rank for rank in (max_rank, target.max_rank) if rank is not None]
        self.asked, self.limit = max_rank, min(limits) if limits else None
        self.struck: list[Strike] = []
        self.anew = False  # whether the file cannot stay as it is, whatever is done to the deltas
        self.apart: dict[str, str] = {}
        self.beside: dict[str, LowRank] = {}
        self.settled = self.made = self.away = source
        self.fitted: dict[str, Fitted] = {}

    def run(self) -> None:
        """All of it, but the writing; under the base's names, if there is one, until the end."""
        self.settled = self.source if self.base is None else self.base.resolve(self.source)
        self.struck = lost(self.settled, self.target, self.base)
        known = {one.rule.id for one in self.struck}
        self.anew = any(one.rule.fit == "write" or one.rule.id not in known for one in lost(self.source, self.target, self.base))
        self._refuse()
        self.apart = {name: one.rule.reason for one in self._of("apart") for name in one.names or (one.place,) if self._holds(name)}
        named = [name for name in self.apart if name in self.settled]
        if named and self.settled.flat:
            fact = "what goes apart needs the base's own names, and these have underscores where it has dots"
            raise UnsupportedError(fact, tensor=named[0], remedy="give --base")
        stay, self.away = split(self.settled, self.apart)
        if not stay.deltas:
            raise NotExpressible(f"nothing of it is left that {self.target.title} takes", remedy=_INSTEAD)
        names = dict.fromkeys(name for one in self._of("lora") for name in one.names if name in stay)
        converted = made_lora(stay, names, self.base, self.asked, self.limit) if names else {}
        kept = {name: Fitted(delta=delta, norm=size_of(delta), error=0.0, optimal=0.0) for name, delta in stay.items()}
        touch = any(True for _ in self._of("bake"))
        joined = self._joined({**kept, **converted})
        fitted = levelled({**kept, **converted, **joined}, self.target, max_rank=self.limit, touch=touch)
        memory = self.target.format in _IN_MEMORY
        own = own_names(self.source, self.settled, joined) if memory else placed(self.settled, self.target)
        if any(one.rule.id == "root" for one in self.struck):
            own = {name: in_memory(own.get(name, name), self.target) for name in (*self.settled, *fitted)}
        self.fitted = {own.get(name, name): one for name, one in fitted.items()}
        self.settled = replace(self.settled, deltas={own.get(name, name): delta for name, delta in self.settled.items()})
        deltas = {name: one.delta for name, one in self.fitted.items()}
        self.made = replace(stay, deltas=deltas, metadata=self._metadata(stay, changed=bool(names)))

    def _of(self, what: str) -> Iterable[Strike]:
        return (one for one in self.struck if one.rule.fit == what)

    def _joined(self, fitted: Mapping[str, Fitted]) -> dict[str, Fitted]:
        """LoRA of zeros on what the target joins to modules that have LoRA."""
        there = {name: one.delta for name, one in fitted.items() if isinstance(one.delta, LowRank)}
        self.beside = zeros(self._of("beside"), there, self.base)
        return {name: Fitted(delta=low, norm=0.0, error=0.0, optimal=0.0) for name, low in self.beside.items()}

    def _holds(self, name: str) -> bool:
        return name in self.settled or name in self.settled.passengers

    def _metadata(self, stay: Adapter, *, changed: bool) -> dict[str, Any]:
        """What the file said, without the settings of a method that it no longer is."""
        peft = stay.metadata.get("peft", {})
        if not changed or "peft_type" not in peft:
            return dict(stay.metadata)
        return {**stay.metadata, "peft": {key: value for key, value in peft.items() if key in CARRIED}}

    def _refuse(self) -> None:
        found = {(one.place, one.rule.id): one for one in self._of("none")}
        other = [one for one in found.values() if one.rule.when == "network" and one.place == WHOLE]
        raise_all(map(_refused, other or found.values()))

    def encoded(self) -> Container:
        """The files: the source's own, byte for byte, where nothing had to change."""
        path = self.source.path
        changed = self.struck or self.anew or any(self.made[name] is not self.settled[name] for name in self.made)
        if not changed and path is not None and path.suffix == ".safetensors":
            return replace(open_container(path), name=path.name)
        raise_all(_unknown(name) for name, delta in self.made.items() if delta.kind == "parameter")
        own = self.source.format in self.target.reads and not self.anew
        written = [row.name for row in FORMATS if row.encode]
        if own and self.source.format in written:
            return encode(self.made, self.source.format)
        return encoded_for(self.made, self.target)

    def prove(self, place: Path) -> None:
        """Look at what was written as `check` does. Raises NotExpressible for what is still lost, so that nothing appears."""
        left = lost(load(place), self.target, None)
        raise_all(map(_refused, left))

    def rows(self) -> list[dict[str, Any]]:
        return rows_of(self.settled, self.fitted)

    def notes(self, saved: Path) -> list[str]:
        """What a person has to do about what went apart, and what the rules note of the rest."""
        told = []
        if self.apart:
            many = f"{len(self.apart)} tensors" if len(self.apart) > 1 else "a tensor"
            what = f"{many} that {self.target.title} does not load with an adapter: in {saved}"
            told.append(f"{what}, to be merged into the base that it runs on: loratools merge BASE {saved} -o MERGED")
        if self.beside:
            many = f"{len(self.beside)} modules have" if len(self.beside) > 1 else "a module has"
            told.append(f"{many} LoRA of zeros, which {self.target.title} joins to LoRA beside it: {', '.join(self.beside)}")
        noted = strikes(subject_of(replace(self.made, path=None), self.target, None), self.target)
        return told + list(dict.fromkeys(one.rule.reason for one in noted if one.rule.loses == "note"))


_IN_MEMORY = ("peft", "mlx")  # formats whose runtimes look for the names that a model has in memory, as the adapter's own file has them
_INSTEAD = "merge it into the base, and serve that"


def _unknown(name: str) -> UnsupportedError:
    return UnsupportedError("LoRA of a parameter, whose experts and shape only the base tells", tensor=name, remedy="give --base")


def _refused(one: Strike) -> NotExpressible:
    return NotExpressible(one.rule.reason.rstrip("."), tensor=one.place, found=one.found, remedy=one.rule.remedy or _INSTEAD)
