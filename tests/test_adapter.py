"""Adapter: a mapping with a map; one that waits for the config of its base."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas.full import Full
from loratools.errors import MatchError
from loratools.families import Family
from loratools.refs import Spec
from loratools.tensors import to_ref


def test_a_mapping_with_a_map() -> None:
    found = Adapter({"a": Full(diff=to_ref(torch.ones(3)), scale=2.0)})
    doubled = found.map(lambda name, delta: dataclasses.replace(delta, scale=2 * delta.scale))  # type: ignore[attr-defined,type-var]
    assert list(found) == ["a"] and len(found) == 1 and found.parameters == 3
    assert doubled["a"].norm() == 2 * found["a"].norm()  # type: ignore[attr-defined]


def test_a_pending_adapter_is_made_of_the_config_of_the_base_that_it_meets() -> None:
    delta = Full(diff=to_ref(torch.ones(3)), scale=1.0)
    unknown = Adapter({"q.bias": delta}, pending=lambda config: Adapter({f"{config['model_type']}.q.bias": delta}))
    base = {"gpt.q.bias": Spec("F32", (3,))}
    found = unknown.resolve(base, Family({"model_type": "gpt"}))
    assert list(found) == ["gpt.q.bias"] and found.pending is None and found.model == {"model_type": "gpt"}
    with pytest.raises(MatchError, match="bert"):
        unknown.resolve(base, Family({"model_type": "bert"}))
