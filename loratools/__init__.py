"""loratools: merge, extract and inspect adapter weights, streaming and exact, with every tensor accounted for.

The public names are resolved on first use, so importing loratools imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Adapter": "loratools.adapter",
    "Checkpoint": "loratools.checkpoint",
    "LoratoolsError": "loratools.errors",
    "check": "loratools.workflows.check",
    "combine": "loratools.ops.combine",
    "compare": "loratools.ops.compare",
    "convert": "loratools.ops.convert",
    "demo": "loratools.workflows.demo",
    "extract": "loratools.ops.extract",
    "fit": "loratools.workflows.fit",
    "inspect": "loratools.ops.inspect",
    "load": "loratools.formats",
    "merge": "loratools.ops.merge",
    "push": "loratools.workflows.push",
    "report": "loratools.workflows.report",
    "rescale": "loratools.ops.rescale",
    "resize": "loratools.ops.resize",
    "save": "loratools.formats",
    "unmerge": "loratools.ops.unmerge",
    "verify": "loratools.ops.verify",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'loratools' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
