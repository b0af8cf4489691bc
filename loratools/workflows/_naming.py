"""The predicates of a target's rules that look at names: whose modules they are, and which a runtime needs beside each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from loratools.workflows._sorts import sort_of
from loratools.workflows._subject import WHOLE, Hit, Subject

_ARTICLES = {
    "language": "a language model", "diffusion": "a diffusion pipeline", "tower": "a vision or audio tower",
    "text encoder": "a CLIP text encoder", "vision": "an image model",
}  # fmt: skip
_OF_FORMAT = {
    **dict.fromkeys(("mlx", "gguf", "torchtune", "litgpt", "nemo", "trtllm"), "language"), "samlora": "vision",
    **dict.fromkeys(("kohya", "comfyui", "diffusers", "cloneofsimo", "xlabs"), "diffusion"),
}  # fmt: skip


def name(
    subject: Subject, *, at: str | None = None, off: str | None = None, sort: str | None = None, beside: str | None = None,
    tasks: Sequence[str] = (),
) -> Iterator[Hit]:  # fmt: skip
    """Deltas of tensors whose names a pattern finds, or does not find; of those, with `sort`, that are of this sort of model.

    With `beside`, only in an adapter that has a name which that pattern finds; not in one whose config's task_type is of `tasks`.
    """
    here = beside is None or any(re.search(beside, one) for one in subject.adapter)
    if not here or (tasks and (subject.config or {}).get("task_type") in tasks):
        return
    for one in subject.adapter:
        found = (at is None or re.search(at, one)) and (off is None or not re.search(off, one))
        if found and (sort is None or sort_of(one) == sort):
            yield Hit(one, (one,))


def network(subject: Subject, *, takes: Sequence[str]) -> Iterator[Hit]:
    """Modules of another sort of model than the target runs; names that tell no sort count for nothing beside others that do."""
    usual = _OF_FORMAT.get(subject.adapter.format or "")
    sorts = {one: sort_of(one) or usual for one in subject.adapter}
    foreign = {one: sort for one, sort in sorts.items() if sort is not None and sort not in takes}
    if foreign and not any(sort in takes for sort in sorts.values()):
        first = next(iter(foreign))
        yield Hit(WHOLE, subject.every, f"modules of {_ARTICLES[foreign[first]]}, {first}" + (" …" if len(foreign) > 1 else ""))
    else:
        yield from (Hit(one, (one,), f"a module of {_ARTICLES[sort]}") for one, sort in foreign.items())


def joined(
    subject: Subject, *, needs: Mapping[str, Sequence[str]] | None = None, where: Mapping[str, Sequence[str]] | None = None,
    at: str | None = None,
) -> Iterator[Hit]:  # fmt: skip
    """A change of a module without one of another beside it that the target joins it to: those of `where` only if the base has one.

    Only tensors whose names `at` finds.
    """
    for tensor in subject.adapter:
        if at is not None and not re.search(at, tensor):
            continue
        module = tensor.removesuffix(".weight")
        parent, _, leaf = module.rpartition(".")
        always = (needs or {}).get(leaf, ())
        asked = dict.fromkeys([*always, *(where or {}).get(leaf, ())])
        names = {other: (f"{parent}." if parent else "") + other + tensor.removeprefix(module) for other in asked}
        known = {other: one for other, one in names.items() if other in always or (subject.base is not None and one in subject.base)}
        lacking = [other for other, name in known.items() if name not in subject.adapter]
        if lacking:
            yield Hit(tensor, (tensor,), f"without LoRA on {' and '.join(lacking)}", tuple(known[other] for other in lacking))
