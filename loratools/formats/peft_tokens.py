"""Trained tokens beside a LoRA: rows that take the place of an embedding's own (`trainable_token_indices`).

Read from peft 0.21.2 (`utils/other.py::set_additional_trainable_modules`, `tuners/trainable_tokens/layer.py`). A list is of the
model's input embedding, a table maps endings of modules' paths to lists. A head that is tied to the embedding gets the same rows;
most files do not repeat them, those of a resized vocabulary do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loratools.deltas.rows import Rows
from loratools.errors import FormatError, LoratoolsError, MatchError, raise_all
from loratools.formats.peft_keys import Module, Sorted
from loratools.formats.peft_values import Values, given, short
from loratools.refs import same_bytes

SLOT = "trainable_tokens_delta"
MARKER = "token_adapter.trainable_tokens_delta"
Indices = tuple[int, ...]


@dataclass(frozen=True)
class Tokens:
    """Which tokens a config says were trained: of the embedding (`embedding`), or by the ending of a module's path (`named`)."""

    embedding: Indices | None = None
    named: Mapping[str, Indices] = field(default_factory=dict)

    def of(self, path: str) -> Indices | None:
        """The tokens of a module. Raises FormatError where the config names it twice."""
        names = [name for name in self.named if path.endswith(name)]
        if len(names) > 1:
            raise FormatError("trainable_token_indices names this module twice", found=", ".join(names))
        return self.named[names[0]] if names else self.embedding


def tokens_of(values: Values) -> Tokens:
    """The field `trainable_token_indices`; faults are gathered."""
    stated = values.config.get("trainable_token_indices")
    if not given(stated):
        return Tokens()
    table: dict[str, Any] = stated if isinstance(stated, dict) else {"": stated}
    for name, indices in table.items():
        if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
            values.faults.append(FormatError(_where(name), found=short(indices), expected="a list of whole numbers from 0 up"))
            return Tokens()
    read = {name: tuple(indices) for name, indices in table.items()}
    return Tokens(named=read) if isinstance(stated, dict) else Tokens(embedding=read[""])


def _where(name: str) -> str:
    return f"adapter_config.json: trainable_token_indices{f' of {name}' if name else ''}"


def take_tokens(found: Sorted, tokens: Tokens) -> tuple[dict[str, Rows], tuple[str, ...]]:
    """The rows by tensor's name, their modules taken off `found`, and what a person should be told.

    Raises FormatError for rows that the config does not ask for or that are missing, MatchError for a module that it does not name.
    """
    modules = {path: module for path, module in found.modules.items() if SLOT in module.refs}
    deltas: dict[str, Rows] = {}
    copies: list[str] = []
    faults: list[LoratoolsError] = []
    for path, module in modules.items():
        try:
            if len(module.refs) > 1:
                other = next(key for slot, key in module.keys.items() if slot != SLOT)
                raise FormatError("trained tokens and a LoRA on one module, which peft does not put together", found=other)
            indices = tokens.of(path)
            if indices is None and _copied(path, modules, tokens):
                copies.append(module.keys[SLOT])
            else:
                deltas[f"{path}.weight"] = _rows(module, indices, tokens)
        except LoratoolsError as error:
            faults.append(error.at(tensor=module.keys[SLOT]))
        del found.modules[path]
    raise_all(faults or _missing(tokens, [path for path in modules if f"{path}.weight" in deltas]))
    return deltas, (f"not needed, copies under the names of tied modules: {', '.join(copies)}",) if copies else ()


def _rows(module: Module, indices: Indices | None, tokens: Tokens) -> Rows:
    if indices is None:
        named = ", ".join(tokens.named)
        fact = "trained tokens that the config does not ask for: peft would drop them in silence"
        raise MatchError(fact, expected=f"trainable_token_indices of {named}" if named else "trainable_token_indices")
    return Rows(values=module.refs[SLOT], indices=indices)


def _copied(path: str, modules: Mapping[str, Module], tokens: Tokens) -> bool:
    """Whether a module that the config does not name repeats the rows of one that it does: it is tied to that."""
    named = [module for other, module in modules.items() if other != path and tokens.of(other) is not None]
    return any(same_bytes(modules[path].refs[SLOT], module.refs[SLOT]) for module in named)


def _missing(tokens: Tokens, there: list[str]) -> list[LoratoolsError]:
    """An error for each module the config promises and the file lacks; of tied ones with equal lists one stands for all."""
    held = {tokens.of(path) for path in there}
    if tokens.embedding is not None and not there:
        return [FormatError("trainable_token_indices is set, and the file has no trained tokens", remedy="the file is incomplete")]
    return [
        FormatError(f"trainable_token_indices names {name}, and the file has no trained tokens of it", remedy="the file is incomplete")
        for name, indices in tokens.named.items()
        if not any(path.endswith(name) for path in there) and indices not in held
    ]
