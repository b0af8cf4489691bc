"""Modules that peft saves whole: a norm's weight replaced alone has the base's own bias put beside it, where there is one.

peft 0.21.2 loads a module of `modules_to_save` with all of its tensors, and fails where its file lacks one (a KeyError of
`utils/save_and_load.py::set_peft_model_state_dict`).
"""

from __future__ import annotations

import re
from dataclasses import replace

from loratools.adapter import Adapter, is_whole
from loratools.deltas.base import Delta
from loratools.formats.base import nearest
from loratools.ops._base import Base
from loratools.refs import Ref

_NORM = re.compile(r"(?:^|.*[._])(?:\w*norm\w*|ln_\w+|ln)$", re.IGNORECASE)


def with_biases(adapter: Adapter, base: Base | None) -> tuple[Adapter, list[str]]:
    """The adapter with the biases of modules whose weight it replaces, as the base has them, and a note on it; without a base the note."""
    alone = [name.removesuffix(".weight") for name, delta in adapter.items() if is_whole(delta) and name.endswith(".weight")]
    alone = [module for module in alone if f"{module}.bias" not in adapter]
    if base is None:
        norms = [module for module in alone if _NORM.fullmatch(module)]
        fact = "norms saved without a bias, which peft cannot load where the model has one; convert --base BASE puts the base's in"
        return adapter, [f"{fact}: {nearest(norms)}"] if norms and adapter.format != "peft" else []
    lacking = [module for module in alone if f"{module}.bias" in base]
    if not lacking:
        return adapter, []
    biases = {f"{module}.bias": _instead(adapter[f"{module}.weight"], base.weight(f"{module}.bias")) for module in lacking}
    note = f"saved with the base's own bias, for peft loads modules whole: {nearest(lacking)}"
    return replace(adapter, deltas={**adapter.deltas, **biases}), [note]


def _instead(saved: Delta, value: Ref) -> Delta:
    """A tensor that is saved as another of its module is."""
    return saved.map(lambda _: value)
