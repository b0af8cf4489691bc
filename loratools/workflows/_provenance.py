"""How an output was made, told from its receipt: the command, what went in by digest, the error beside the best possible.

Paths of the machine it was made on are told by their last component: a card is public.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from statistics import median
from typing import Any

import loratools
from loratools.workflows._markdown import code, entities, fenced, table

# the arguments of each operation that are no options
POSITIONAL = {
    "extract": ("base", "tuned"), "merge": ("base", "adapters"), "combine": ("adapters",), "convert": ("adapter",),
    "rescale": ("adapter",), "resize": ("adapter",), "fit": ("adapter",), "unmerge": ("merged",),
}  # fmt: skip
_OPTIONS = {"target": "for", "from_format": "from"}
_SILENT = ("out", "overwrite", "threads", "device")  # which decide nothing about what was written
_PATHS = ("base", "initial")
_NAME = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?:hf://)?({_NAME}/{_NAME})@([0-9a-f]{{40}})(?:/.*)?", re.ASCII)
# a model's id: user/name, or the name alone that the Hub's first models have
MODEL = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
WORST = 5


def is_model(text: object) -> bool:
    """Whether it can be the id of a model on the Hub.

    >>> is_model("ada/model"), is_model("gpt2"), is_model("./model"), is_model("out/a/b")
    (True, True, False, False)
    """
    return isinstance(text, str) and MODEL.fullmatch(text) is not None and "--" not in text and ".." not in text


def repository(path: object) -> tuple[str, str] | None:
    """The repository and the commit that a receipt's path names, if it was read from the Hub.

    >>> repository("hf://ada/style@" + 40 * "0" + "/adapter_model.safetensors")[0]
    'ada/style'
    """
    found = _REPOSITORY.fullmatch(str(path))
    return (found[1], found[2]) if found is not None else None


def base_of(receipt: Mapping[str, Any]) -> str | None:
    """The repository on the Hub that the base was read from, where it was."""
    found = next((row.get("path") for row in _rows(receipt, "inputs") if row.get("role") == "base"), None)
    from_hub = repository(found) if found is not None else None
    return from_hub[0] if from_hub is not None else None


def local_base(receipt: Mapping[str, Any]) -> str | None:
    """The path of the base on the machine that wrote the receipt."""
    found = _table(receipt.get("arguments")).get("base")
    return found if isinstance(found, str) and repository(found) is None else None


def told(receipt: Mapping[str, Any]) -> list[str]:
    """The lines of a card on how it was made."""
    history = [step for step in [*_rows(receipt, "history"), receipt] if step.get("operation") in POSITIONAL]
    if not history:
        return []
    lines = [f"By loratools {entities(receipt.get('loratools', ''))}:", ""]
    lines += fenced("sh", [command(step) for step in history])
    rows = [_input(row) for row in _rows(receipt, "inputs")]
    if rows:
        lines += ["", "From", "", *table(["what", "name", "bytes", "BLAKE3"], rows)]
    lines += ["", f"Applied: {receipt.get('applied')} of {receipt.get('expected')} changes.", *_errors(receipt), *_rest(receipt)]
    return lines


def command(receipt: Mapping[str, Any]) -> str:
    """The command line that does what a receipt tells, as far as its arguments were no defaults."""
    operation, said = str(receipt["operation"]), _table(receipt.get("arguments"))
    defaults = {word.name: word.default for word in inspect.signature(getattr(loratools, operation)).parameters.values()}
    words = ["loratools", operation]
    for name in POSITIONAL[operation]:
        value = said.get(name)
        words += [shown(one) for one in (value if isinstance(value, list) else [value])]
    words += ["-o", shown(said.get("out", "OUT"))]
    for name, value in said.items():
        if name in defaults and name not in (*POSITIONAL[operation], *_SILENT) and not _same(value, defaults[name]):
            words += _option(name, value)
    return " ".join(shlex.quote(word) for word in words)


def shown(path: object) -> str:
    """A path by its last component, a repository by its name.

    >>> shown("/home/ada/models/base/"), shown("ada/style"), shown("/tmp/x.safetensors:0.5")
    ('base', 'ada/style', 'x.safetensors:0.5')
    """
    text = str(path)
    if repository(text) is not None or re.fullmatch(rf"{_NAME}/{_NAME}(@[\w.-]+)?(:-?[\d.e+-]+)?", text, re.ASCII):
        return text
    return PurePath(text).name or text


def _option(name: str, value: object) -> list[str]:
    word = f"--{_OPTIONS.get(name, name.replace('_', '-'))}"
    if isinstance(value, bool):
        return [word] if value else [word.replace("--", "--no-", 1)]
    each = value if isinstance(value, list | tuple) else [value]
    return [part for one in each for part in (word, shown(one) if name in _PATHS else str(one))]


def _same(value: object, default: object) -> bool:
    if isinstance(value, list | tuple):
        return list(value) == list(default if isinstance(default, list | tuple) else ())
    return value is None or value == default


def _input(row: Mapping[str, Any]) -> list[str]:
    return [entities(row.get("role", "")), code(shown(row.get("path"))), str(row.get("bytes")), code(row.get("blake3"))]


def _errors(receipt: Mapping[str, Any]) -> Iterator[str]:
    """The error of what was approximated, beside the best possible at those ranks."""
    low = [row for row in _rows(receipt, "tensors") if _number(row.get("error")) and _number(row.get("optimal_error")) and row.get("rank")]
    if not low:
        return
    errors, best = [row["error"] for row in low], [row["optimal_error"] for row in low]
    yield from ("", f"Relative error ‖Δ − B·A‖ / ‖Δ‖ of {len(low)} matrices: median {median(errors):.4g} "
                f"(best possible at these ranks {median(best):.4g}). The worst:", "")  # fmt: skip
    worst = sorted(low, key=lambda row: (-row["error"], str(row.get("name"))))[:WORST]
    cells = [[code(row.get("name")), str(row["rank"]), f"{row['error']:.4g}", f"{row['optimal_error']:.4g}"] for row in worst]
    yield from table(["tensor", "rank", "error", "best possible"], cells)


def _rest(receipt: Mapping[str, Any]) -> list[str]:
    left = [row for row in _rows(receipt, "left_out") if row.get("relative_norm") is not None]
    if not left:
        return []
    names = ", ".join(code(row.get("name")) for row in left[:WORST])
    more = f" and {len(left) - WORST} more" if len(left) > WORST else ""
    return ["", f"Changed and left out: {names}{more}."]


def _rows(receipt: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    found = receipt.get(name)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
