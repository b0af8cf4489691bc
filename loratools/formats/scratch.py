"""The from-scratch tutorials' state dicts: `LinearWithLoRA` and `LinearWithDoRAMerged` around an `nn.Linear` named `linear`.

    NAME.linear.weight (out, in)  NAME.linear.bias (out)      the wrapped layer
    NAME.lora.A (in, rank)        NAME.lora.B (rank, out)     ΔW = alpha·(A·B)ᵀ
    NAME.m (1, in)                                            DoRA, one norm for each column of W

Read from rasbt's dora-from-scratch and LLMs-from-scratch (appendix E, `appendix_e.py`). alpha is a Python attribute and not in
the file; the scale is alpha itself, in the newer book (8f3e5b0, September 2025) alpha / rank. See spec/formats/scratch.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, NotExpressible, ShapeError, UnsupportedError, raise_all
from loratools.formats._refused import BAKE, KEPT, nothing, passengers
from loratools.formats._scale import ALPHA, exact_alpha, number, only
from loratools.formats.base import Container, ReadOptions
from loratools.refs import Ref

NAME = "scratch"
SCALE = "loratools.scale"  # metadata of files that loratools writes
DORA = "loratools.scratch_dora"
SCALES = ("alpha", "alpha/r")
DORAS = ("merged", "output")
_KEY = re.compile(r"(?:(?P<module>.+)\.)?(?P<slot>lora\.A|lora\.B|linear\.weight|linear\.bias|m)")


def detect(container: Container) -> bool:
    """Whether it holds a pair `lora.A`, `lora.B` of one module."""
    ends = {key.removesuffix("lora.A") for key in container.tensors if key == "lora.A" or key.endswith(".lora.A")}
    return any(f"{end}lora.B" in container.tensors for end in ends)


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter in a tutorial's state dict; the wrapped layers' own weights and all other tensors are whole tensors of it.

    Raises AmbiguousError without an alpha, and for a DoRA on a square layer without `scratch_dora`; UnsupportedError for
    `LinearWithDoRA`, which normalises its output and is no weight edit.
    """
    options = options or ReadOptions()
    try:
        modules, others = _sort(container.tensors)
        alpha, scale = _scale(container, options)
        dora = _word(options.scratch_dora, container, DORA, DORAS)
        deltas: dict[str, Delta] = {}
        faults: list[LoratoolsError] = []
        for name, module in modules.items():
            try:
                deltas |= module.deltas(name, alpha, scale, dora)
            except LoratoolsError as error:
                faults.append(error.at(tensor=_join(name, "lora.A")))
        for name, ref in others.items():
            if name in deltas:
                faults.append(FormatError("the same tensor twice under two spellings", tensor=name))
            deltas[name] = Replacement(value=ref)
        raise_all(faults)
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    note = f"scale {scale}" + ("; the newer book's is --scale alpha/r" if scale == "alpha" and SCALE not in container.metadata else "")
    notes = (note,) if options.scale is None else ()
    return Adapter(deltas, {"safetensors": dict(container.metadata)}, {}, container.path, NAME, container.files, None, notes)


@dataclass
class _Module:
    """A wrapped layer's tensors by slot."""

    refs: dict[str, Ref] = field(default_factory=dict)

    def deltas(self, name: str, alpha: float, scale: str, dora: str | None) -> dict[str, Delta]:
        change: Delta = self._low_rank(name, alpha, scale)
        if "m" in self.refs:
            assert isinstance(change, LowRank)
            change = _with_magnitude(replace(change, layer="linear"), self.refs["m"], dora, _join(name, "m"))
        if "linear.weight" in self.refs:
            weight = self.refs["linear.weight"]
            if weight.spec.shape != self._shape():
                expected = f"linear.weight {list(weight.spec.shape)}"
                raise ShapeError("the factors do not fit the layer", found=self._shown(), expected=expected)
            change = Chain(first=Replacement(value=weight), then=change)
        found: dict[str, Delta] = {_join(name, "weight"): change}
        if "linear.bias" in self.refs:
            found[_join(name, "bias")] = Replacement(value=self.refs["linear.bias"])
        return found

    def _low_rank(self, name: str, alpha: float, scale: str) -> LowRank:
        for slot in ("lora.A", "lora.B"):
            if slot not in self.refs:
                raise FormatError(f"has no {slot} beside it", tensor=_join(name, next(iter(self.refs))), remedy="the file is incomplete")
        A, B = self.refs["lora.A"], self.refs["lora.B"]
        a, b = A.spec.shape, B.spec.shape
        if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
            raise ShapeError("A and B do not meet", found=self._shown(), expected="lora.A [in, rank], lora.B [rank, out]")
        # the tutorial's layers are (out, in), which a base of other code, such as GPT-2's, need not be
        return LowRank(A=A.T, B=B.T, alpha=exact_alpha(alpha, a[1]) if scale == "alpha" else alpha)

    def _shape(self) -> tuple[int, int]:
        return self.refs["lora.B"].spec.shape[1], self.refs["lora.A"].spec.shape[0]

    def _shown(self) -> str:
        return f"lora.A {list(self.refs['lora.A'].spec.shape)}, lora.B {list(self.refs['lora.B'].spec.shape)}"


def _with_magnitude(low: LowRank, m: Ref, dora: str | None, key: str) -> DoRA:
    out, into = low.shape()
    if m.spec.shape not in ((1, into), (1, out)):
        expected = f"[1, {into}] or [1, {out}]"
        raise ShapeError("the magnitude does not fit its factors", tensor=key, found=list(m.spec.shape), expected=expected)
    if out == into and dora is None:
        raise AmbiguousError(
            "on a square layer LinearWithDoRAMerged and LinearWithDoRA cannot be told apart", tensor=key, found=list(m.spec.shape),
            remedy="give --scratch-dora merged or --scratch-dora output",
        )  # fmt: skip
    if m.spec.shape == (1, out) and (out != into or dora == "output"):
        fact = "LinearWithDoRA divides the LoRA's output by that output's own norm, which depends on the input: it is no weight edit"
        expected = f"[1, {into}], as LinearWithDoRAMerged has it"
        raise UnsupportedError(fact, tensor=key, found=list(m.spec.shape), expected=expected)
    return DoRA(direction=low, magnitude=m)


def _sort(tensors: Mapping[str, Ref]) -> tuple[dict[str, _Module], dict[str, Ref]]:
    """The wrapped layers by name, and the tensors of all others."""
    wrapped = {match["module"] or "" for key in tensors if (match := _KEY.fullmatch(key)) and match["slot"].startswith("lora.")}
    modules = {name: _Module() for name in sorted(wrapped)}
    others: dict[str, Ref] = {}
    for key, ref in tensors.items():
        match = _KEY.fullmatch(key)
        if match is not None and (match["module"] or "") in modules:
            modules[match["module"] or ""].refs[match["slot"]] = ref
        else:
            others[key] = ref
    return modules, others


def _scale(container: Container, options: ReadOptions) -> tuple[float, str]:
    alpha = options.alpha if options.alpha is not None else number(container.metadata, ALPHA)
    if alpha is None:
        raise AmbiguousError("alpha is not in the file: it is an attribute of the tutorial's class", remedy="give it with --alpha-in A")
    return alpha, _word(options.scale, container, SCALE, SCALES) or "alpha"


def _word(given: str | None, container: Container, key: str, known: tuple[str, ...]) -> str | None:
    """The option, else what the metadata of a file that loratools wrote says."""
    word = given or container.metadata.get(key)
    if word not in (None, *known):
        raise FormatError(key.removeprefix("loratools."), found=word, expected=" or ".join(known))
    return word


def encode(adapter: Adapter) -> Container:
    """The adapter as the tutorial's keys, with alpha in the metadata; factors keep their bytes, in another order.

    Raises NotExpressible for what its classes cannot say: other deltas, row-wise magnitudes, layers of different scales.
    """
    tensors: dict[str, Ref] = {}
    scalings: dict[str, float] = {}
    faults = passengers(adapter, "the tutorial's file has")
    adapted = {name.rpartition(".")[0] for name, delta in adapter.items() if not isinstance(delta, Replacement)}
    for name, delta in adapter.items():
        try:
            tensors |= _encoded(name, delta, adapted, scalings)
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    if not scalings and not faults:
        faults.append(nothing(adapter.path, next(iter(adapter), None)))
    raise_all(faults)
    alpha = only(scalings, "the tutorial's classes share one alpha, and the scaling is alpha itself", BAKE)
    doras = {DORA: "merged"} if any(key == "m" or key.endswith(".m") for key in tensors) else {}
    return Container(tensors, {ALPHA: repr(alpha), SCALE: "alpha", **doras})


_REMEDY = f"convert it first: --kind lora; {KEPT}"


def _encoded(name: str, delta: Delta, adapted: set[str], scalings: dict[str, float]) -> dict[str, Ref]:
    module, _, leaf = name.rpartition(".")
    if isinstance(delta, Replacement):
        return {_join(module, f"linear.{leaf}") if module in adapted and leaf == "bias" else name: delta.value}
    tensors: dict[str, Ref] = {}
    if isinstance(delta, Chain) and isinstance(delta.first, Replacement):
        tensors[_join(module, "linear.weight")] = delta.first.value
        delta = delta.then
    low = delta.direction if isinstance(delta, DoRA) else delta
    if not isinstance(low, LowRank) or low.layer not in ("linear", "unknown") or len(low.shape()) != 2 or leaf != "weight":
        found: object = f"{delta.kind} of a {low.layer} weight" if isinstance(low, LowRank) else delta.kind
        raise NotExpressible("the tutorial's classes change linear layers by LoRA and DoRA alone", found=found, remedy=_REMEDY)
    if isinstance(delta, DoRA):
        if delta.magnitude.spec.shape != (1, low.shape()[1]):
            expected = f"[1, {low.shape()[1]}], one for each column"
            found, remedy = list(delta.magnitude.spec.shape), "convert --magnitude-axis in --base BASE refits it"
            raise NotExpressible("the tutorial's DoRA has another axis", found=found, expected=expected, remedy=remedy)
        tensors[_join(module, "m")] = delta.magnitude
    scalings[name] = low.scaling
    return tensors | {_join(module, "lora.A"): low.A.T, _join(module, "lora.B"): low.B.T}


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
