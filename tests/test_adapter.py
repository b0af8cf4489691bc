"""Adapter: a mapping with a map."""

from __future__ import annotations

import dataclasses

import torch

from loratools.adapter import Adapter
from loratools.deltas.full import Full
from loratools.tensors import to_ref


def test_a_mapping_with_a_map() -> None:
    found = Adapter({"a": Full(diff=to_ref(torch.ones(3)), scale=2.0)})
    doubled = found.map(lambda name, delta: dataclasses.replace(delta, scale=2 * delta.scale))  # type: ignore[attr-defined,type-var]
    assert list(found) == ["a"] and len(found) == 1 and found.parameters == 3
    assert doubled["a"].norm() == 2 * found["a"].norm()  # type: ignore[attr-defined]
