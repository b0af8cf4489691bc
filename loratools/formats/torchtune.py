"""torchtune: `adapter_model.pt` (`adapter_0.pt` of older runs) beside `adapter_config.json`, under torchtune's names.

    MODULE.lora_a.weight (r, in)   MODULE.lora_b.weight (out, r)   ΔW = alpha/r · lora_b·lora_a     MODULE.magnitude (out)   DoRA

Of models that torchtune permutes when it reads them (llama, mistral, gemma) rows of q and k stand in pairs that rotate together: they
are laid as transformers has them by the heads of the base. Read from torchtune's `modules/peft/lora.py`, `dora.py`,
`models/convert_weights.py` and `training/checkpointing/_checkpointer.py`; spec/formats/torchtune.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, ShapeError, UnsupportedError, raise_all
from loratools.formats._heads import Heads, rows_of, text_config
from loratools.formats._pickled import folder_of
from loratools.formats._pieces import Piece, picked
from loratools.formats._refused import BAKE, RESIZE
from loratools.formats._scalar import finite
from loratools.formats._scale import only
from loratools.formats._trainer import Model, Module, Part, Reading, deltas_of, modules_of, waiting
from loratools.formats.base import CONFIG, Container, ReadOptions
from loratools.layouts.trainers import Leaf
from loratools.refs import Ref

NAME, FILE = "torchtune", "adapter_model.pt"
_KEY = re.compile(r"(?P<module>.+)\.(?P<slot>lora_a\.weight|lora_b\.weight|magnitude)")
_KNOWN = ("r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path")
_BIASED = re.compile(r"\.attn\.[qkv]_proj\.magnitude$")  # of qwen2, whose q, k and v have biases
_SCALED = "DoRA of q, k or v: torchtune's forward scaled their biases too, which its merge leaves as they are, and so does this"
_ONE = "torchtune has one {0} for all modules"


def detect(container: Container) -> bool:
    """Whether it has factors `lora_a.weight` and `lora_b.weight`, which nobody else writes."""
    return any(key.endswith(".lora_a.weight") for key in container.tensors)


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter under the names of transformers; headers only. Without the model's config.json beside it, `pending` on the base's.

    Raises AmbiguousError without an alpha, FormatError for strays, incomplete modules and models whose names are not known,
    UnsupportedError for LoRA of experts, ShapeError.
    """
    return _Reading(container, options or ReadOptions()).now()


class _Reading(Reading):
    depends = "whether rows of q and k are permuted, and what its modules are,"

    def adapter(self, config: Mapping[str, Any]) -> Adapter:
        model, _ = Model.of(NAME, config), self._stated()
        parts, deltas, faults = list[Part](), dict[str, Delta](), list[LoratoolsError]()
        for module, pair in _modules(self.container.tensors).items():
            try:
                made = self._placed(module, pair, model)
                if isinstance(made, Part):
                    parts.append(made)
                else:
                    deltas |= [made]
            except LoratoolsError as error:
                faults.append(error.at(tensor=f"{module}.{next(iter(pair))}"))
        raise_all(faults)
        deltas |= deltas_of(parts, model.heads)
        files = (*self.container.files, *self.container.used("config.json"))
        source = (self.container.config or {}).get("base_model_name_or_path")
        biased = text_config(model.config).get("model_type") == "qwen2" and any(_BIASED.search(key) for key in self.container.tensors)
        notes = (_SCALED,) if biased else ()
        told = {"peft": {"base_model_name_or_path": source}} if isinstance(source, str) else {}
        return Adapter(deltas, told, {}, self.container.path, NAME, files, notes=notes, model=model.config)

    def _placed(self, module: str, pair: Mapping[str, Ref], model: Model) -> Part | tuple[str, Delta]:
        lacking = [slot for slot in ("lora_a.weight", "lora_b.weight") if slot not in pair]
        if lacking:
            raise FormatError(f"has no {lacking[0]} beside it", remedy="the file is incomplete")
        A = pair["lora_a.weight"]
        piece = Piece(A, pair["lora_b.weight"], self._alpha(A), pair.get("magnitude"))
        if model.family is None:
            return waiting(module, piece, self.unknown())
        found = model.family.module(module)
        if found is None:
            raise FormatError(f"not a module that torchtune has in a {model.family.name}", expected=", ".join(_leaves(model)))
        row, numbers = found
        return Part(row.leaves[0], numbers, piece.part(rows_of(row.order, 0, piece.rows, model.heads)))

    def _alpha(self, A: Ref) -> float:
        if len(A.spec.shape) != 2 or not A.spec.numel:
            raise ShapeError("not a factor", found=list(A.spec.shape), expected="[r, in]", remedy="a shard, or empty as ZeRO-3 leaves it?")
        config, rank = self.container.config or {}, A.spec.shape[0]
        if config.get("r", rank) != rank:
            raise ShapeError(f"the rank is not that of {CONFIG}", found=rank, expected=config["r"])
        return self._stated()

    def _stated(self) -> float:
        """The one alpha of the config, or of the options."""
        config = self.container.config or {}
        unknown = [key for key in config if key not in _KNOWN]
        if unknown:
            raise FormatError(f"{CONFIG}: a field torchtune does not write", found=", ".join(unknown), expected=", ".join(_KNOWN))
        alpha = config.get("lora_alpha") if self.options.alpha is None else self.options.alpha
        if alpha is None:
            fact = f"no alpha in the file: torchtune keeps it in {CONFIG}"
            raise AmbiguousError(fact, remedy="put that beside it, or give the alpha with --alpha-in A")
        if not finite(alpha):
            raise FormatError(f"{CONFIG}: lora_alpha", found=alpha, expected="a number")
        return float(alpha)


def _leaves(model: Model) -> list[str]:
    assert model.family is not None
    return [row.module for row in model.family.rows]


def _modules(tensors: Mapping[str, Ref]) -> dict[str, dict[str, Ref]]:
    modules: dict[str, dict[str, Ref]] = {}
    faults: list[LoratoolsError] = []
    for key, ref in tensors.items():
        match = _KEY.fullmatch(key)
        if match:
            modules.setdefault(match["module"], {})[match["slot"]] = ref
        elif re.search(r"\.experts\.lora_(gate|down|up)_[ab]$", key):
            faults.append(UnsupportedError("LoRA of grouped experts, which is not read", tensor=key))
        else:
            faults.append(FormatError("not a tensor torchtune writes in an adapter", tensor=key, expected="lora_a, lora_b or magnitude"))
    raise_all(faults)
    return modules


# -- writing


def encode(adapter: Adapter) -> Container:
    """The adapter as torchtune resumes from it: its names, rows of q and k as its attention wants them, one rank and alpha for all.

    Raises NotExpressible for other kinds than LoRA and DoRA along rows, ranks and scalings that differ, modules torchtune has no LoRA on,
    and for models of which it is not known whether they are permuted; AmbiguousError for heads that nothing tells.
    """
    modules, heads, _ = modules_of(adapter, NAME)
    tensors: dict[str, Ref] = {}
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for module in modules:
        piece, tensor = module.pieces[0], module.tensors[0]
        rows = _rows(module, heads)
        back = sorted(range(piece.rows), key=rows.__getitem__)
        tensors |= {f"{module.name}.lora_a.weight": piece.A, f"{module.name}.lora_b.weight": picked(piece.B, back)}
        if piece.magnitude is not None:
            tensors[f"{module.name}.magnitude"] = picked(piece.magnitude, back)
        ranks[tensor], alphas[tensor] = float(piece.rank), piece.alpha
    rank = int(only(ranks, _ONE.format("rank"), RESIZE))
    alpha = only(alphas, _ONE.format("alpha"), BAKE)
    targets = sorted({_target(module.row.leaves[0]) for module in modules})
    config = {
        "r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "target_modules": targets, "peft_type": "LORA",
        "base_model_name_or_path": adapter.metadata.get("peft", {}).get("base_model_name_or_path"),
    }  # fmt: skip
    written = {key: value for key, value in config.items() if value is not None}
    model = dict(adapter.model)

    def beside(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        if model:
            (folder / "config.json").write_text(json.dumps(model, indent=2) + "\n", encoding="utf-8")

    writer = folder_of(FILE, beside=beside)
    return Container(tensors, config=written, name=FILE, beside={"config.json": model}, writer=writer)


def _rows(module: Module, heads: Heads | None) -> list[int]:
    """Where rows of transformers' weight lie in torchtune's."""
    try:
        return rows_of(module.row.order, 0, module.pieces[0].rows, heads)
    except LoratoolsError as error:
        raise error.at(tensor=module.tensors[0]) from None


def _target(leaf: Leaf) -> str:
    """What torchtune's checkpointer has in `target_modules`: transformers' name of the module."""
    return leaf.name.rpartition(".")[2]
