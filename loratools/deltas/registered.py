"""The order in which transformers' modules register the parameters of their experts; peft wraps them in it, the first innermost."""

from __future__ import annotations

from collections.abc import Iterable

REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")


def in_registered_order(names: Iterable[str]) -> list[str]:
    """Names of one module's parameters as its class is known to register them; those that are not known stand last.

    >>> in_registered_order(["down_proj", "gate_up_proj"])
    ['gate_up_proj', 'down_proj']
    """
    return sorted(names, key=_place)


def as_registered(names: Iterable[str]) -> bool:
    """Whether the names that are known come in that order.

    >>> as_registered(["e.up_proj", "e.other", "e.down_proj"]), as_registered(["e.down_proj", "e.up_proj"])
    (True, False)
    """
    known = [_place(name) for name in names if _place(name) < len(REGISTERED)]
    return known == sorted(known)


def _place(name: str) -> int:
    leaf = name.rpartition(".")[2]
    return REGISTERED.index(leaf) if leaf in REGISTERED else len(REGISTERED)
