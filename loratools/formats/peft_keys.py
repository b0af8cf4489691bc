"""The keys of peft's files: which tensor is which part of which module, and which is a whole tensor of the base.

Read from peft 0.21.2 (`utils/save_and_load.py`, `tuners/tuners_utils.py`); the grammar is told in spec/formats/peft.md.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from loratools.deltas.full import Replacement
from loratools.errors import FormatError, LoratoolsError, MatchError, raise_all
from loratools.families import of_head, of_vocabulary
from loratools.formats.base import Container, nearest
from loratools.formats.peft_targets import Targets
from loratools.refs import Ref, same_bytes

ROOT = "base_model.model."
SAVED = "loratools.saved"  # metadata: JSON list of all whole tensors, some of which `bias` and `modules_to_save` cannot name
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


class Key(NamedTuple):
    """A module's tensor: which module (`""` for those of the whole adapter), which of its tensors, under which adapter's name."""

    module: str
    slot: str
    adapter: str | None = None


Grammar = Callable[[str], Key | None]  # a key without its prefix; None: no tensor of the method. FormatError: nothing peft writes


@dataclass
class Module:
    """The adapter tensors of one module, by marker, and the keys they came from."""

    refs: dict[str, Ref] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


@dataclass
class Sorted:
    """A file's tensors: modules that are adapted, whole tensors by base name, and what was found twice or dead.

    `some` is whether the file lists its whole tensors itself, so that its config's `bias` does not mean all of them.
    """

    modules: dict[str, Module] = field(default_factory=lambda: defaultdict(Module))
    whole: dict[str, Replacement] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    some: bool = False


@dataclass(frozen=True)
class _Whole:
    """One spelling of a whole tensor: `base` from a base_layer, `original` the base's own beside a saved module."""

    key: str
    ref: Ref
    base: bool
    original: bool


def sort_keys(container: Container, config: Targets, grammar: Grammar) -> Sorted:
    """The file's tensors by what they are; strays and doubles are collected and raised."""
    found = Sorted(some=SAVED in container.metadata)
    spellings: dict[str, list[_Whole]] = defaultdict(list)
    names: set[str] = set()
    faults: list[LoratoolsError] = []
    paths = {key: _path(key) for key in container.tensors}
    rooted = any(root for _, root in paths.values())
    for key, ref in container.tensors.items():
        path, root = paths[key]
        try:
            part = grammar(path)
            if rooted and not root and (part is None or part.module):
                raise FormatError("lacks the prefix that the others have", expected=ROOT)
            if part is None:
                name, whole = _whole(path, key, ref)
                spellings[name].append(whole)
            else:
                names |= {part.adapter} if part.adapter else set()
                _keep_part(part, key, ref, found.modules)
        except FormatError as error:
            faults.append(error.at(tensor=key))
    if len(names) > 1:
        faults.append(FormatError("holds several adapters", found=", ".join(sorted(names)), remedy="save each in a folder of its own"))
    listed = _listed(container.metadata)
    faults += _keep_whole(spellings, config, listed, found)
    faults += [FormatError("listed among the saved tensors, and not in the file", tensor=name) for name in listed if name not in spellings]
    raise_all(faults)
    return found


def _path(key: str) -> tuple[str, bool]:
    """A key without wrappers and `base_model.model.` (doubled ones too), and whether it had that prefix."""
    path = _WRAPPERS.sub("", key)
    path = path.removeprefix("module.") if path.startswith("module." + ROOT) else path
    path = path.removeprefix("model.") if path.startswith("model." + ROOT) else path
    bare = re.sub(rf"^(?:{re.escape(ROOT)})+", "", path)
    return bare.removeprefix("module.") if path != bare else bare, path != bare


def _keep_part(part: Key, key: str, ref: Ref, modules: dict[str, Module]) -> None:
    module = modules[part.module.removesuffix(".base_layer")]
    if part.slot in module.refs:
        raise FormatError("the same tensor twice under two spellings", found=module.keys[part.slot])
    module.refs[part.slot], module.keys[part.slot] = ref, key


def check_targeted(path: str, module: Module, config: Targets, *, nested: bool) -> None:
    """peft builds modules from the config and drops tensors of others; older versions adapted inside saved modules (`nested`)."""
    if not (config.targets(path) or config.ties(path) or (nested and config.saves(path))):
        raise MatchError(
            "the config does not target this module, so peft would drop it in silence", tensor=next(iter(module.keys.values())),
            found=path, expected=config.target if isinstance(config.target, str) else nearest(config.target or (), 6),
            remedy="add it to target_modules, or remove it",
        )  # fmt: skip


# -- whole tensors


def _whole(path: str, key: str, ref: Ref) -> tuple[str, _Whole]:
    """The base's name for a whole tensor, and how it was spelt."""
    name = path = path.replace(".token_adapter.base_layer.", ".base_layer.")
    if ".modules_to_save." in path:
        tail = path.partition(".modules_to_save.")[2]
        name = path.replace(".modules_to_save.", ".", 1) if "." not in tail else re.sub(r"\.modules_to_save\.[^.]+\.", ".", path)
    base, original = ".base_layer." in name, ".original_module." in name
    return name.replace(".base_layer.", ".").replace(".original_module.", "."), _Whole(key, ref, base, original)


def _keep_whole(spellings: Mapping[str, list[_Whole]], config: Targets, listed: list[str], found: Sorted) -> list[LoratoolsError]:
    """File whole tensors under their base names, if the config accounts for them; else the errors that name them.

    Beside a saved module peft writes the base's own tensor too, as `original_module`, where it also saves all biases or the
    embeddings, and the saved one a second time: those are dead, as long as the copies are alike.
    """
    faults: list[LoratoolsError] = []
    dead: list[str] = []
    adapted = {path.replace(".base_layer.", ".") for path in found.modules}
    for name, all_of_them in spellings.items():
        first, *others = sorted((item for item in all_of_them if not item.original), key=lambda item: len(item.key)) or all_of_them
        if first.original:
            remedy = "save the adapter with save_pretrained"
            faults.append(FormatError("the base's own tensor from a live state dict", tensor=first.key, remedy=remedy))
        elif not _covered(name, all_of_them, config, listed, adapted):
            remedy = "list its module in modules_to_save if it was trained, else remove it"
            faults += [
                MatchError("neither a tensor of the method nor one that the config says was saved", tensor=item.key, remedy=remedy)
                for item in all_of_them
            ]
        elif different := [item for item in others if not same_bytes(item.ref, first.ref)]:
            faults.append(FormatError("the same tensor twice under two spellings, and not alike", tensor=different[0].key, found=first.key))
        else:
            module = name.rpartition(".")[0]
            new = config.saves(module) or name in listed or of_head(f"{module}.weight")
            found.whole[name] = Replacement(value=first.ref, new=new)
            dead += [item.key for item in all_of_them if item is not first]
    if dead:
        shown = ", ".join(dead[:3]) + (f", … ({len(dead)} in all)" if len(dead) > 3 else "")
        found.notes = (f"not needed, second copies or the base's own beside what was saved: {shown}",)
    return faults


def _covered(name: str, spelt: Iterable[_Whole], config: Targets, listed: list[str], modules: Set[str]) -> bool:
    module, _, leaf = name.rpartition(".")
    return (
        config.saves(module)
        or name in listed
        or (config.bias == "all" and "bias" in name)  # older versions of peft took every key with `bias` in it
        or (config.bias == "own" and leaf == "bias" and module in modules)
        or of_vocabulary(name)  # saved without being asked for, where embeddings are adapted or resized
        or (leaf == "weight" and module in modules and any(item.base for item in spelt))
    )


def _listed(metadata: Mapping[str, str]) -> list[str]:
    try:
        names = json.loads(metadata.get(SAVED, "[]"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"metadata {SAVED} is not a list of names", found=metadata.get(SAVED))
    return names
