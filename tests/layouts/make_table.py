"""Writes loratools/layouts/transformers-*.tsv from the installed transformers: `python -m tests.layouts.make_table`.

Its rules are those of `conversion_mapping.py`, one a line, in their order; its models are those that are made of several parts with rules
of their own, found by building each class without weights. `test_transformers.py` holds the file against the installed version.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers import conversion_mapping as mapping
from transformers import core_model_loading as loading

OUT = Path(__file__).parents[2] / "loratools" / "layouts" / "transformers-5.23.tsv"
HEADER = """\
# Names of tensors in files (left) and in memory (right), read from transformers {version}, conversion_mapping.py (Apache-2.0).
# key  rename   a regular expression, and what the text that it matches becomes; \\1 is its group
# key  group    several such, if any tensor has the first
# key  rename+n the same, the group being a number to add n to
# key  experts  matrices numbered by the group, one above the other and then stacked
# key  other    what becomes other tensors by arithmetic or cutting, which is not done here, and the name of it
# key  same     the rules of another key
# class  model  base_model_prefix, and the keys whose rules it has: of all its tensors, or @ of those below a path
"""


def regex(source: str) -> str:
    """A source pattern as transformers compiles it (WeightTransform.__init__)."""
    found = source.replace("*.", r".*\.")
    return found + r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", found) else found


def numbered(source: str) -> str:
    """The same with the experts' number, which may be anything there, in a group."""
    assert source.count(".*.") == 1, source
    return regex(source.replace(".*.", r".(\d+)."))


def row(transform: Any) -> tuple[str, str, str, str]:
    """Kind, sources, targets and operations of a rule."""
    sources, targets = [regex(source) for source in transform.source_patterns], list(transform.target_patterns)
    if isinstance(transform, loading.WeightConverter):
        names = "+".join(type(operation).__name__ for operation in transform.operations)
        dims = [getattr(operation, "dim", None) for operation in transform.operations]
        if (names, dims) in (("MergeModulelist", [0]), ("MergeModulelist+Concatenate", [0, 1])):
            return "experts", " ".join(map(numbered, transform.source_patterns)), " ".join(targets), ""
        return "other", " ".join(sources), " ".join(targets), names
    if isinstance(transform, loading.GroupWeightRename):
        return "group", " ".join(sources), " ".join(targets), ""
    kind = f"rename+{transform.offset}" if hasattr(transform, "offset") else "rename"
    assert len(targets) == 1 and (len(sources) == 1 or "\\1" not in targets[0]), transform
    return kind, "|".join(sources), targets[0], ""


def rules() -> list[str]:
    """Every key's rules; keys with the same rules have them once."""
    table = {key: ["\t".join(row(transform)).rstrip("\t") for transform in found] for key, found in all_rules().items()}
    first: dict[tuple[str, ...], str] = {}
    lines = []
    for key in sorted(table):
        if (other := first.setdefault(tuple(table[key]), key)) != key:
            lines.append(f"{key}\tsame\t{other}")
        else:
            lines += [f"{key}\t{line}" for line in table[key]]
    return lines


@cache
def all_rules() -> dict[str, list[Any]]:
    return dict(mapping._build_checkpoint_conversion_mapping())


def parts(model: PreTrainedModel) -> list[tuple[str, str | None]]:
    """The keys whose rules a model has and where, as `get_model_conversion_mapping` collects them; None is everywhere."""
    keys = all_rules()
    seen: dict[str, list[str]] = defaultdict(list)
    found: list[tuple[str, str | None]] = []

    def claimed(identifier: str, name: str) -> bool:
        return any(other == "" or name.startswith(f"{other}.") for other in seen[identifier])

    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel) or claimed(type(part).__name__, name):
            continue
        of_class, kind = type(part).__name__, part.config.model_type
        if of_class not in keys and (kind not in keys or claimed(kind, name)):
            continue
        path = name.removeprefix(model.base_model_prefix).removeprefix(".") if name else None
        found.append((of_class if of_class in keys else kind, path))
        seen[of_class].append(name)
        if of_class not in keys:
            seen[kind].append(name)
    return found


def line(model: PreTrainedModel) -> str | None:
    """A model's row, or None where its class or type alone tells its rules."""
    found = parts(model)
    if not found or (len(found) == 1 and found[0][1] is None):
        return None
    told = " ".join(key if scope is None else f"{key}@{scope}" for key, scope in found)
    return f"{type(model).__name__}\tmodel\t{model.base_model_prefix or '-'}\t{told}"


# settings without which a class cannot be built from its defaults
RESNET = {"use_timm_backbone": False, "backbone": None, "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]}}
SETTINGS: dict[str, dict[str, Any]] = {
    "AyaVisionModel": {"vision_config": {"model_type": "siglip_vision_model"}},
    "AyaVisionForConditionalGeneration": {"vision_config": {"model_type": "siglip_vision_model"}},
    "BeitForSemanticSegmentation": {"out_indices": [1, 2, 3, 4]},
    "Emu3Model": {"vocabulary_map": {"image token": 1}},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"image token": 1}},
    **dict.fromkeys(("DetrModel", "DetrForObjectDetection", "DetrForSegmentation"), RESNET | {"use_pretrained_backbone": False}),
    **dict.fromkeys(("ConditionalDetrModel", "ConditionalDetrForObjectDetection"), RESNET | {"use_pretrained_backbone": False}),
}


def classes() -> Iterator[type[PreTrainedModel]]:
    folder = Path(transformers.__file__).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        try:
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        except ImportError:
            continue
        for _, found in sorted(inspect.getmembers(module, inspect.isclass)):
            if issubclass(found, PreTrainedModel) and found.__module__ == module.__name__:
                yield found


def built(found: type[PreTrainedModel]) -> PreTrainedModel:
    """A class's model of default settings, without weights."""
    with torch.device("meta"):
        return found(found.config_class(**SETTINGS.get(found.__name__, {})))


def models() -> tuple[list[str], list[str]]:
    """The rows of all classes that can be built, and the names of those that cannot."""
    rows, failed = [], []
    for found in classes():
        if found.__name__.endswith("PreTrainedModel") or found.config_class is None:
            continue
        try:
            told = line(built(found))
        except Exception:
            failed.append(found.__name__)
            continue
        rows += [told] if told else []
    return sorted(rows), failed


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stderr(None):
        rows, failed = models()
    text = HEADER.format(version=transformers.__version__) + "\n".join([*rules(), *rows]) + "\n"
    OUT.write_text(text, encoding="utf-8")
    keys = set(all_rules())
    print(f"{len(text.splitlines())} lines; not built: {len(failed)}, with rules by their class: {sorted(set(failed) & keys)}")


if __name__ == "__main__":
    main()
