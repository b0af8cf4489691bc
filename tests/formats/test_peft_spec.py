"""spec/formats/peft.md holds the tables of peft's methods and of their configs' fields as the code has them.

python tests/formats/test_peft_spec.py     writes them anew
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import peft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from loratools.deltas.base import Delta  # noqa: E402
from loratools.deltas.laid import Unsettled, WherePresent  # noqa: E402
from loratools.formats import load, peft_config, peft_targets  # noqa: E402
from loratools.formats.peft_methods import GONE, METHODS, NOT_TOLD, NOT_WEIGHTS  # noqa: E402
from tests.interop.methods import all_cases  # noqa: E402
from tests.interop.zoo import Zoo  # noqa: E402

DOCUMENT = ROOT / "spec" / "formats" / "peft.md"
BEGIN, END = "<!-- tables: written by tests/formats/test_peft_spec.py -->\n", "<!-- end of tables -->\n"

# what the fields of a LoRA's config mean; the codec says which of them it uses
MEANINGS = {
    "peft_type": "`LORA`",
    "r": "the rank where no pattern gives another; may be missing",
    "lora_alpha": "the alpha where no pattern gives another",
    "use_rslora": "s = alpha/√r",
    "use_dora": "every module has a magnitude",
    "rank_pattern": "regular expressions to ranks",
    "alpha_pattern": "regular expressions to alphas",
    "fan_in_fan_out": "carried; decides nothing",
    "lora_bias": "`.lora_B.bias` is a difference of the bias, times s",
    "bias": "`none`, `all` or `lora_only`: biases saved whole",
    "modules_to_save": "modules saved whole",
    "target_modules": "names, endings of paths, a regular expression or `all-linear`",
    "exclude_modules": "exceptions from the targets",
    "layers_to_transform": "layer numbers among the targets",
    "layers_pattern": "where a path has its layer number",
    "task_type": "adds a task's head to `modules_to_save`",
    "init_lora_weights": "whether the base changed before training: [Initialisations](#initialisations)",
    "ensure_weight_tying": "a tied head's LoRA is the embedding's",
    "target_parameters": "tensors that are no layer's weight",
    "lora_B_layout": "how the experts' B is packed",
    "auto_mapping": "class of the model",
    "base_model_name_or_path": "the base",
    "revision": "its revision",
    "peft_version": "who wrote it; where experts are square, how they lie",
    "use_qalora": "inputs are pooled: [Variants](#variants)",
    "qalora_group_size": "of `use_qalora`; nothing without it",
    "use_bdlora": "block-diagonal factors: [Variants](#variants)",
    "kasa_config": "the base is truncated: [Variants](#variants)",
    "enable_lora": "of peft 0.1 and 0.2: the slots of merged layers",
    "merge_weights": "of peft 0.1 and 0.2: true or false; no matter in a file",
    "trainable_token_indices": "rows of embeddings: [Trained tokens](#trained-tokens)",
    "megatron_config": "parallel layers",
    "megatron_core": "their module",
    "eva_config": "data-driven initialisation",
    "runtime_config": "never saved",
    "velora_config": "compressed activations, in training only",
    "monteclora_config": "sampled factors, in training only",
    "loftq_config": "of a quantised base",
    "corda_config": "of `init_lora_weights`",
    "lora_ga_config": "of `init_lora_weights`",
}


def tables() -> str:
    """The fields of a LoRA's config, the other methods, and the fields of theirs, as Markdown."""
    inits = ", ".join(json.dumps(value) for value in peft_config.INITS if value not in ("true", "false"))
    moving = ", ".join(json.dumps(value) for value in peft_config.MOVING)
    return f"""
## Config fields

*used* is read and checked; *training* matters while training or loading, not to what the trained tensors mean, and is carried along;
*refused* changes the arithmetic: an error, unless null, false or empty. A field this table lacks is refused too. These values of
`init_lora_weights` left the base as it was: {inits}. These moved a part of it: {moving}. Any other is refused.

{_table(("field", "", "meaning"), _lora_fields())}

## Other methods

The formulas are those of [deltas.md](../deltas.md). A key is `base_model.model.` + the module's path + `.` + one of these tensors (regular
expressions), or `base_model.` + a shared one. Layers are those that the tests compare with peft's own forward; `Conv1D` is transformers',
whose weight is turned.

{_table(("`peft_type`", "what it is", "tensors", "deltas", "layers", "read", "written"), _methods())}

Refused by name:

{_table(("`peft_type`", "why"), _refused())}

Fields of their configs, as above; *needed* ones must be true.

{_table(("`peft_type`", "used", "training", "refused"), _fields())}

"""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)).replace("|  |", "| |")


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _lora_fields() -> Iterator[tuple[str, str, str]]:
    for kind, names in (("used", peft_config.USED), ("training", peft_config.TRAINING)):
        yield from ((f"`{name}`", kind, MEANINGS.get(name, "")) for name in names)
    yield from ((f"`{name}`", "refused", why) for name, why in peft_config.REFUSED.items())


def _methods() -> Iterator[tuple[str, ...]]:
    for name, row in sorted(METHODS.items()):
        deltas, layers = seen().get(name, (set(), {}))
        shared = [f"`base_model.` {_expression(slot)}" for slot in row.shared]
        slots, written = ", ".join([*map(_expression, row.slots), *shared]), "yes" if row.writing is not None else "no"
        yield f"`{name}`", row.title, slots, ", ".join(sorted(deltas)), ", ".join(layers), "yes", written


def _expression(slot: str) -> str:
    return "`" + slot.replace("|", "\\|") + "`"


def _refused() -> Iterator[tuple[str, str]]:
    for name, why in sorted({**NOT_WEIGHTS, **NOT_TOLD, **GONE}.items()):
        yield f"`{name}`", why


def _fields() -> Iterator[tuple[str, str, str, str]]:
    yield "all", _code(peft_targets.USED), _code(peft_targets.TRAINING), ""
    for name, row in sorted(METHODS.items()):
        used = [_code(row.settings)] if row.settings else []
        used += [f"needed: {_code([field])} ({why})" for field, why in row.needed.items()]
        used += [f"`bias` may be `{row.own_biases}`"] if row.own_biases else []
        yield f"`{name}`", "; ".join(used), _code(row.training), "; ".join(f"`{field}`: {why}" for field, why in row.refused.items())


@cache
def seen() -> dict[str, tuple[set[str], dict[str, None]]]:
    """Of each method the kinds of deltas that its cases are read as, and the kinds of layers they are put on."""
    found: dict[str, tuple[set[str], dict[str, None]]] = {}
    zoo = Zoo()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, case in enumerate(all_cases().values()):
            model = case.wrapped(Path(folder) / str(number))
            deltas, layers = found.setdefault(str(model.peft_config["default"].peft_type.value), (set(), {}))
            deltas |= {name for delta in load(Path(folder) / str(number) / "adapter").values() for name in _kinds(delta)}
            layers |= {type(getattr(zoo, layer)).__name__: None for layer in case.layers}
    order = list(dict.fromkeys(type(layer).__name__ for layer in zoo.children()))
    return {name: (deltas, dict.fromkeys(sorted(layers, key=order.index))) for name, (deltas, layers) in found.items()}


def _kinds(delta: Delta) -> Iterator[str]:
    if not isinstance(delta, Unsettled | WherePresent):
        yield type(delta).__name__
    for field in dataclasses.fields(delta):
        value = getattr(delta, field.name)
        for inner in value if isinstance(value, tuple) else (value,):
            if isinstance(inner, Delta):
                yield from _kinds(inner)


def written() -> str:
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + tables() + END + after


def test_the_document_is_what_the_code_says() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert BEGIN in text and END in text
    assert text == written(), "python tests/formats/test_peft_spec.py writes spec/formats/peft.md anew"


def test_every_delta_is_told_in_the_specification_of_deltas() -> None:
    text = (ROOT / "spec" / "deltas.md").read_text(encoding="utf-8")
    assert {name for deltas, _ in seen().values() for name in deltas if name not in text} == set()


def test_what_a_used_field_of_a_lora_means_is_told() -> None:
    assert {name for name in peft_config.USED if name not in MEANINGS} == set()
    assert {name for name in MEANINGS if name not in (*peft_config.USED, *peft_config.TRAINING)} == set()


def test_every_type_of_the_installed_peft_is_in_one_table() -> None:
    """A new release's method is found here before it is found in a user's file."""
    groups = [{"LORA"}, set(METHODS), set(NOT_WEIGHTS), set(NOT_TOLD)]
    installed = {str(kind.value) for kind in PeftType}
    assert {name for group in groups for name in group} == installed
    assert sum(map(len, groups)) == len(installed) and not installed & set(GONE)


def test_every_field_of_the_installed_configs_is_in_the_table() -> None:
    """A new release's field is found here before it is found in a user's file; so is one that a row has and peft has not."""
    common = {*peft_targets.USED, *peft_targets.TRAINING}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        fields = {field.name for field in dataclasses.fields(config)}
        row = METHODS.get(str(kind.value))
        if row is not None:
            own = {*row.settings, *row.training, *row.refused, *row.needed}
            assert fields - common - own == set(), kind
            assert own - fields == set(), kind
            assert len(own) == sum(map(len, (row.settings, row.training, row.refused, row.needed))), kind
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - {*peft_config.USED, *peft_config.TRAINING, *peft_config.REFUSED} == set()


if __name__ == "__main__":
    DOCUMENT.write_text(written(), encoding="utf-8")
    sys.exit(0)
