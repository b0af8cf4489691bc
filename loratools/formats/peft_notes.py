"""What a peft config says and its tensors do not: no fault, since peft itself loads it, but worth telling."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from loratools.formats._patterns import pattern_key
from loratools.formats.peft_config import LoraConfig
from loratools.formats.peft_targets import HEADS

READERS_RANK = 8  # peft's default for a config without r


def unused(config: LoraConfig, stated: Mapping[str, Any], modules: Collection[str], whole: Iterable[str]) -> tuple[str, ...]:
    """A sentence for each setting that meets no tensor; `stated` is the config as its file has it, `modules` those with LoRA."""
    saved = {name.rpartition(".")[0] for name in whole}
    heads = HEADS.get(str(stated.get("task_type")), ())  # peft lists all of a task's usual heads, of which a model has one
    excused = heads if any(head in name for name in saved for head in heads) else ()
    listed = [entry for entry in stated.get("modules_to_save") or [] if entry not in excused]
    lacking = {
        "target_modules": [entry for entry in config.target if not _ends(entry, modules)] if isinstance(config.target, tuple) else [],
        "modules_to_save": [entry for entry in listed if not any(name.endswith(entry) or f"{entry}." in name for name in saved)],
        "rank_pattern": _idle(config.rank_pattern, modules),
        "alpha_pattern": _idle(config.alpha_pattern, modules),
    }
    told = {field: ", ".join(names) for field, names in lacking.items() if names}
    notes = [f"adapter_config.json: {field} names {names}, and the file has nothing there" for field, names in told.items()]
    if config.r is None:
        notes.append(f"adapter_config.json lacks r: the tensors tell the ranks here, peft would take {READERS_RANK}")
    return tuple(notes)


def _ends(entry: str, modules: Iterable[str]) -> bool:
    return any(module == entry or module.endswith("." + entry) for module in modules)


def _idle(patterns: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Patterns that decide for no module, none of it being theirs or an earlier one winning throughout."""
    deciding = {pattern_key(patterns, module) for module in modules}
    return [pattern for pattern in patterns if pattern not in deciding]
