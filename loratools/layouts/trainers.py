"""What modules of litgpt, torchtune and NeMo are in transformers: the table `trainers.tsv` beside this file.

A module is made of slots, rows in an order of the trainer's, each of which is a weight of transformers' or rows of one that is fused
there too. An order tells where the rows of each slot lie:

    whole        one slot                         qkv           q, k and v one above the other
    halves       two slots of as many rows        grouped       by group of heads that share k and v: its q, its k, its v
    rope         one, rows of each head in pairs  interleaved   grouped in the weight, B as litgpt had it until 2024-12-26
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

_TABLE = Path(__file__).parent / "trainers.tsv"


@dataclass(frozen=True)
class Leaf:
    """A weight of transformers', without `.weight`, or one slot of it in an `order`."""

    name: str
    order: str = "whole"
    slot: int = 0


@dataclass(frozen=True)
class Row:
    """A trainer's module, the order of its rows, and what each slot is; `{}` stands for a number in every name."""

    module: str
    order: str
    leaves: tuple[Leaf, ...]

    @cached_property
    def compiled(self) -> re.Pattern[str]:
        return _pattern(self.module)


@dataclass(frozen=True)
class Family:
    """Models of some `model_type`s that a trainer names alike."""

    trainer: str
    name: str
    types: tuple[str, ...]
    rows: tuple[Row, ...]

    def module(self, name: str) -> tuple[Row, tuple[str, ...]] | None:
        """The row of a trainer's module and the numbers in its name, None for one that the family lacks."""
        for row in self.rows:
            found = row.compiled.fullmatch(name)
            if found:
                return row, found.groups()
        return None

    def leaf(self, name: str) -> list[tuple[Row, int, tuple[str, ...]]]:
        """(row, slot, numbers) of all modules that a weight of transformers', without `.weight`, is or is in."""
        pairs = [(row, slot, _pattern(leaf.name).fullmatch(name)) for row in self.rows for slot, leaf in enumerate(row.leaves)]
        return [(row, slot, found.groups()) for row, slot, found in pairs if found]


def families(trainer: str) -> tuple[Family, ...]:
    """All of a trainer's families, in the table's order.

    >>> [family.name for family in families("torchtune")]
    ['llama', 'qwen', 'phi3']
    """
    return tuple(family for family in table() if family.trainer == trainer)


def family_of(trainer: str, kind: object) -> Family | None:
    """The family of a `model_type`, None for one that the trainer's table lacks."""
    return next((family for family in families(trainer) if kind in family.types), None)


def of_litgpt(keys: Iterable[str]) -> bool:
    """Whether bare factors among the keys are of a block of litgpt's network, whose modules no other network calls so.

    >>> of_litgpt(["transformer.h.0.mlp.fc_1.lora_A"]), of_litgpt(["transformer.h.0.attn.c_attn.lora_A"])
    (True, False)
    """
    templates = {template_of(key.removesuffix(".lora_A")) for key in keys if key.endswith(".lora_A")}
    return any(row.module in templates for family in families("litgpt") for row in family.rows if "{}" in row.module)


def template_of(name: str) -> str:
    """A module's name with its numbers open.

    >>> template_of("transformer.h.0.mlp.fc_1")
    'transformer.h.{}.mlp.fc_1'
    """
    return ".".join("{}" if word.isdigit() else word for word in name.split("."))


def named(template: str, numbers: tuple[str, ...]) -> str:
    """A template with its numbers filled in."""
    return template.format(*numbers)


@cache
def table() -> tuple[Family, ...]:
    """The file, in its order."""
    rows: dict[tuple[str, str], list[Row]] = {}
    types: dict[tuple[str, str], tuple[str, ...]] = {}
    for line in _TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        trainer, family, module, *cells = line.split("\t")
        if module == "types":
            types[trainer, family] = tuple(cells[0].split(" "))
        else:
            leaves = tuple(_leaf(word) for word in cells[1].split(" "))
            rows.setdefault((trainer, family), []).append(Row(module, cells[0], leaves))
    return tuple(Family(trainer, family, types[trainer, family], tuple(found)) for (trainer, family), found in rows.items())


def _leaf(word: str) -> Leaf:
    name, _, place = word.partition("@")
    order, _, slot = place.partition(".")
    return Leaf(name, order, int(slot)) if place else Leaf(name)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
