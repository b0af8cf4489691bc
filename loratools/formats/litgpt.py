"""litgpt: `lit_model.pth.lora`, {"model": …}, beside `hyperparameters.yaml` (alpha, which layers) and `model_config.yaml` (heads).

    MODULE.lora_A (r, in)            .lora_B (out, r)          ΔW = alpha/r · lora_B·lora_A
    …attn.qkv.lora_A (r·n, in)       .lora_B (Σ rows, r)       of the n of q, k, v that are enabled: rows of A and of B one above the other

Until 2024-12-26 the fused weight was `attn.attn`, its rows grouped by heads that share k and v; B then had the rows of q, of k, of v
laid among those, but where all three were enabled, when B's rows were taken as they stand, whichever of the three they meet. Read from
litgpt's `litgpt/lora.py` and its history, `scripts/merge_lora.py`, `scripts/convert_lit_checkpoint.py`; spec/formats/litgpt.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, MatchError, OptionError, ShapeError, raise_all
from loratools.formats._bare import HYPER, is_litgpt
from loratools.formats._heads import REMEDY, config_of
from loratools.formats._pickled import folder_of
from loratools.formats._pieces import Piece, stacked
from loratools.formats._refused import BAKE, RESIZE
from loratools.formats._scalar import finite
from loratools.formats._scale import only
from loratools.formats._sides import write_yaml
from loratools.formats._trainer import Model, Part, Reading, deltas_of, modules_of, waiting
from loratools.formats.base import Container, ReadOptions
from loratools.formats.litgpt_files import FILE, hyperparameters, model_config
from loratools.formats.litgpt_qkv import parts_of
from loratools.refs import Ref

NAME = "litgpt"
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])")
_FUSED = ("qkv", "interleaved")
_ONE = "litgpt has one {0} for all modules"


def detect(container: Container) -> bool:
    """Whether it holds bare factors of litgpt's network, by `is_litgpt`, and no config of peft's."""
    return not (container.config and "peft_type" in container.config) and is_litgpt(container)


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter under the names of transformers; headers only. What its side files do not tell is `pending` on the base's config.

    Raises AmbiguousError without an alpha and for modules whose slots or rows nothing tells, FormatError for strays and incomplete
    modules, MatchError where the base has other heads, ShapeError.
    """
    return _Reading(container, options or ReadOptions()).now()


class _Reading(Reading):
    @property
    def beside(self) -> Mapping[str, Any]:
        return {}  # litgpt's own files tell its model

    def pending(self, config: Mapping[str, Any]) -> Adapter:
        """Its side files may tell as much as a config: what neither does is a fault of its module."""
        try:
            return self.adapter(config, strict=True)
        except LoratoolsError as error:
            raise error.at(file=self.container.path) from None

    def adapter(self, config: Mapping[str, Any], *, strict: bool = False) -> Adapter:
        hyper = self.container.beside.get(HYPER, {})
        model, _ = self._model(config, hyper), self._stated(hyper)
        parts, deltas, faults = list[Part](), dict[str, Delta](), list[LoratoolsError]()
        for module, pair in _modules(self.container.tensors).items():
            try:
                parts += self._parts(module, pair, model, hyper)
            except AmbiguousError as error:
                if strict or len(pair) < 2 or error.remedy != REMEDY:
                    faults.append(error.at(tensor=f"{module}.lora_A"))
                else:
                    deltas |= [self._waiting(module, pair, hyper, error)]
            except LoratoolsError as error:
                faults.append(error.at(tensor=f"{module}.lora_{next(iter(pair))}"))
        raise_all(faults)
        deltas |= deltas_of(parts, model.heads)
        files = (*self.container.files, *self.container.used(HYPER, "model_config.yaml"))
        return Adapter(deltas, {}, {}, self.container.path, NAME, files, model=model.config)

    def _model(self, config: Mapping[str, Any], hyper: Mapping[str, Any]) -> Model:
        """What the side files tell, and the base's config, which must agree. Raises MatchError where they do not."""
        kind, heads = model_config(self.container.beside.get("model_config.yaml", {}), hyper)
        own = {} if heads is None else config_of(heads, kind)
        own = {"model_type": kind} if kind and not own else own
        model = Model.of(NAME, config or own)
        if heads and model.heads and heads != model.heads:
            raise MatchError("its heads are not the base's", found=heads, expected=model.heads)
        return replace(model, heads=model.heads or heads)

    def _parts(self, module: str, pair: Mapping[str, Ref], model: Model, hyper: Mapping[str, Any]) -> list[Part]:
        for factor in "AB":
            if factor not in pair:
                raise FormatError(f"has no lora_{factor} beside it", remedy="the file is incomplete")
        A, B, alpha = pair["A"], pair["B"], self._alpha(pair["B"], hyper)
        if model.family is None:
            raise AmbiguousError("what its modules are in transformers depends on the model, which nothing tells", remedy=REMEDY)
        found = model.family.module(module)
        if found is None:
            known = ", ".join(row.module for row in model.family.rows)
            raise FormatError(f"not a module that litgpt has in a {model.family.name}", expected=known)
        row, numbers = found
        if row.order not in _FUSED:
            return [Part(row.leaves[0], numbers, Piece(A, B, alpha))]
        if model.heads is None:
            raise AmbiguousError("which rows are those of q, k and v depends on the model's heads, which nothing tells", remedy=REMEDY)
        slots = parts_of(row.order, A, B, alpha, model.heads, self._enabled(hyper), dated=bool(hyper))
        return [Part(row.leaves[slot], numbers, piece) for slot, piece in slots]

    def _enabled(self, hyper: Mapping[str, Any]) -> tuple[bool, ...] | None:
        """Which of q, k and v are, by the hyperparameters or the options. Raises OptionError where these say another thing."""
        found = [hyper.get(f"lora_{slot}") for slot in ("query", "key", "value")]
        told = tuple(bool(flag) for flag in found) if all(isinstance(flag, bool) for flag in found) else None
        asked = self.options.enable_lora
        if asked is not None and (len(asked) != 3 or told not in (None, asked)):
            expected = "a 1 or 0 for each of q, k and v" + ("" if told is None else f", as {HYPER} has them: {_flags(told)}")
            raise OptionError("--enable-lora", found=_flags(asked), expected=expected)
        return told or asked

    def _alpha(self, B: Ref, hyper: Mapping[str, Any]) -> float:
        rank = B.spec.shape[-1]
        if hyper.get("lora_r", rank) != rank:
            raise ShapeError(f"the rank is not that of {HYPER}", found=rank, expected=hyper["lora_r"])
        return self._stated(hyper)

    def _stated(self, hyper: Mapping[str, Any]) -> float:
        """The one alpha of the hyperparameters, or of the options."""
        alpha = hyper.get("lora_alpha") if self.options.alpha is None else self.options.alpha
        if alpha is None:
            fact = f"no alpha in the file: litgpt keeps it in {HYPER}"
            raise AmbiguousError(fact, remedy="put that beside it, or give the alpha with --alpha-in A")
        if not finite(alpha):
            raise FormatError(f"{HYPER}: lora_alpha", found=alpha, expected="a number")
        return float(alpha)

    def _waiting(self, module: str, pair: Mapping[str, Ref], hyper: Mapping[str, Any], why: AmbiguousError) -> tuple[str, Delta]:
        A, B, alpha = pair["A"], pair["B"], self._alpha(pair["B"], hyper)
        blocks = A.spec.shape[0] // max(1, B.spec.shape[1])
        wide = B if blocks == 1 else stacked([B.T] * blocks).T
        return waiting(module, Piece(A, wide, alpha * blocks), why)


def _flags(enabled: tuple[bool, ...]) -> str:
    return ",".join(str(int(flag)) for flag in enabled)


def _modules(tensors: Mapping[str, Ref]) -> dict[str, dict[str, Ref]]:
    modules: dict[str, dict[str, Ref]] = {}
    faults: list[LoratoolsError] = []
    for key, ref in tensors.items():
        match = _KEY.fullmatch(key)
        if match and len(ref.spec.shape) == 2 and ref.spec.numel:
            modules.setdefault(match["module"], {})[match["factor"]] = ref
        elif match:
            faults.append(ShapeError("not a factor", tensor=key, found=list(ref.spec.shape), expected="a matrix that is not empty"))
        else:
            remedy = "weights of the base beside LoRA may hold it merged: give the file that litgpt finetune writes"
            faults.append(FormatError("not a tensor litgpt writes in an adapter", tensor=key, expected="lora_A or lora_B", remedy=remedy))
    raise_all(faults)
    return modules


# -- writing


def encode(adapter: Adapter) -> Container:
    """The adapter as `litgpt merge_lora` reads it, with a fused q, k and v as it has them since 2024-12-26.

    Raises NotExpressible for other kinds than LoRA, ranks and alphas that differ, layers that have LoRA on different modules, and
    tensors that litgpt has no LoRA on.
    """
    modules, heads, _ = modules_of(adapter, NAME, want=lambda row: row.order != "interleaved", plain="litgpt has no DoRA")
    tensors: dict[str, Ref] = {}
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for module in modules:
        pieces = [module.pieces[slot] for slot in sorted(module.pieces)]
        for slot, piece in module.pieces.items():
            ranks[module.tensors[slot]], alphas[module.tensors[slot]] = float(piece.rank), piece.alpha
        A, B = stacked([piece.A for piece in pieces]), stacked([piece.B for piece in pieces])
        tensors |= {f"{module.name}.lora_A": A, f"{module.name}.lora_B": B}
    rank = int(only(ranks, _ONE.format("rank"), RESIZE))
    alpha = only(alphas, _ONE.format("alpha"), BAKE)
    hyper = hyperparameters(adapter, rank, alpha, modules, heads)

    def beside(folder: Path) -> None:
        write_yaml(folder / HYPER, hyper)

    return Container(
        tensors, name=FILE, beside={HYPER: hyper}, writer=folder_of(FILE, within="model", beside=beside)
    )
