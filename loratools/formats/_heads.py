"""How many heads a model has and where the rows of each slot of a fused weight lie, by the orders of `layouts/trainers.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.errors import AmbiguousError, FormatError, ShapeError

Rows = list[int]
REMEDY = "give --base the model it belongs to, with its config.json"


@dataclass(frozen=True)
class Heads:
    """`query` heads of `size` rows each, in `groups` that share a key and a value head."""

    query: int
    groups: int
    size: int

    def __post_init__(self) -> None:
        if min(self.query, self.groups, self.size) < 1 or self.query % self.groups:
            raise FormatError("heads that make no groups", found=f"{self.query} heads, {self.groups} of them with keys")

    @property
    def fused(self) -> int:
        """Rows of q, k and v together."""
        return (self.query + 2 * self.groups) * self.size

    def slots(self) -> tuple[int, int, int]:
        """Rows of q, of k, of v."""
        return self.query * self.size, self.groups * self.size, self.groups * self.size


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model, within that of one that sees or hears too."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, Mapping) else config


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """The heads that a config.json tells, None where it tells none. Raises FormatError for numbers that are none.

    >>> heads_of({"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64})
    Heads(query=8, groups=2, size=8)
    >>> heads_of({"model_type": "gpt2", "n_head": 12, "n_embd": 768})
    Heads(query=12, groups=12, size=64)
    """
    text = text_config(config)
    query = text.get("num_attention_heads", text.get("n_head"))
    if query is None:
        return None
    if text.get("model_type") == "falcon" and not text.get("new_decoder_architecture"):
        groups = 1 if text.get("multi_query", True) else query
    else:
        shared = text.get("num_key_value_heads", text.get("num_kv_heads"))
        groups = query if shared is None else shared
    size, hidden = text.get("head_dim"), text.get("hidden_size", text.get("n_embd"))
    if size is None and type(query) is int and query > 0 and type(hidden) is int:
        size = hidden // query
    if size is None or not all(type(number) is int for number in (query, groups, size)):
        raise FormatError("config.json: the heads", found=f"{query}, {groups} of {size} rows", expected="whole numbers")
    return Heads(query, groups, size)


def config_of(heads: Heads, kind: str | None) -> dict[str, Any]:
    """The heads as a config.json has them, with the `model_type` where it is known."""
    told = {"num_attention_heads": heads.query, "num_key_value_heads": heads.groups, "head_dim": heads.size}
    return told if kind is None else {"model_type": kind, **told}


def rows_of(order: str, slot: int, total: int, heads: Heads | None) -> Rows:
    """Where the rows of a slot lie among the `total` rows of a weight whose rows are in this order.

    Raises AmbiguousError where they depend on heads that are not known, ShapeError for a number of rows that they do not make.

    >>> rows_of("grouped", 1, 8, Heads(query=4, groups=2, size=1))
    [2, 6]
    """
    if order == "whole":
        return list(range(total))
    if order == "halves":
        if total % 2:
            raise ShapeError("rows that are no two halves", found=total)
        return list(range(slot * total // 2, (slot + 1) * total // 2))
    if heads is None:
        raise AmbiguousError("where its rows lie depends on the model's heads, which nothing tells", remedy=REMEDY)
    if order == "rope":
        return _pairs(total, heads)
    if total != heads.fused:
        raise ShapeError("not the rows of q, k and v of the model's heads", found=total, expected=f"{heads.fused} for {heads}")
    first = (0, heads.query, heads.query + heads.groups)[slot]
    if order == "qkv":
        return list(range(first * heads.size, first * heads.size + heads.slots()[slot]))
    share = heads.query // heads.groups
    low, high = ((0, share), (share, share + 1), (share + 1, share + 2))[slot]
    size = heads.size
    return [row for g in range(heads.groups) for row in range((g * (share + 2) + low) * size, (g * (share + 2) + high) * size)]


def _pairs(total: int, heads: Heads) -> Rows:
    """Where each row of q or k, as transformers has them, lies where the rows that rotate together are neighbours."""
    size, half = heads.size, heads.size // 2
    if size % 2 or total not in heads.slots()[:2]:
        raise ShapeError("not the rows of q or k of the model's heads", found=total, expected=" or ".join(map(str, heads.slots()[:2])))
    return [head * size + 2 * row + side for head in range(total // size) for side in range(2) for row in range(half)]
