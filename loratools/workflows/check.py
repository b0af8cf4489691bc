"""check: what a runtime would refuse, ignore or mis-scale of an adapter, each with its weight in it and where the rule was read.

The rules are data, one file a target (`workflows/targets/`); spec/check.md lists them.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

from loratools.adapter import Adapter
from loratools.formats.reading import Reading, reads
from loratools.ops._algebra import label
from loratools.workflows._checking import look


@reads
def check(
    adapter: str | Path | Adapter, target: str, *, base: str | Path | None = None, **reading: Unpack[Reading]
) -> dict[str, Any]:
    """Say what a runtime would refuse, ignore or mis-scale of an adapter; returns the document that spec/check.schema.json describes.

    `target` is peft, vllm, sglang, llama.cpp, mlx, diffusers, comfyui or kohya. With `base`, changes that only the weights tell
    (DoRA, saved tensors) are weighed too, and tied heads are seen. Raises OptionError for a target there is not, and what reading
    and `Adapter.resolve` raise.

    >>> check("adapter/", "vllm")["clean"]  # doctest: +SKIP
    True
    """
    seen = look(adapter, target, base, dict(reading))
    found = [asdict(finding) for finding in seen.findings]
    return {
        "path": label(adapter), "format": seen.adapter.format, "target": target, "title": seen.target.title, "clean": not found,
        "tensors": len(seen.adapter), "rules": len([rule for rule in seen.target.rules if rule.loses != "note"]),
        "findings": found, "unmeasured": seen.unmeasured, "notes": [*seen.adapter.notes, *seen.notes],
    }  # fmt: skip
