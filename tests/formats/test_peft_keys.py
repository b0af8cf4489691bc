"""Keys sorted: prefixes and wrappers off, parts to their modules, whole tensors to base names, strays and doubles told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loratools.errors import FormatError, LoratoolsError, MatchError
from loratools.formats.base import Container
from loratools.formats.peft_config import parse
from loratools.formats.peft_keys import ROOT, SAVED, Key, check_targeted, sort_keys
from loratools.tensors import to_ref
from tests.files import peft_config

ONE = to_ref(torch.ones(2))


def grammar(path: str) -> Key | None:
    """`.part` is a module's, `base_model.bank` the adapter's, `.wrong` nothing peft writes."""
    if path == "base_model.bank":
        return Key("", "bank")
    module, _, leaf = path.rpartition(".")
    if leaf == "wrong":
        raise FormatError("not a key peft writes")
    return Key(module, leaf) if leaf in ("part", "other") else None


def sort(keys: list[str], metadata: dict[str, str] | None = None, **config: Any) -> Any:
    return sort_keys(Container(dict.fromkeys(keys, ONE), metadata or {}), parse(peft_config(target_modules=["q"]) | config), grammar)


def test_modules_banks_and_whole_tensors() -> None:
    found = sort([f"{ROOT}a.q.part", f"{ROOT}a.q.base_layer.other", "base_model.bank", f"{ROOT}head.weight"], modules_to_save=["head"])
    assert {module: list(item.refs) for module, item in found.modules.items()} == {"a.q": ["part", "other"], "": ["bank"]}
    assert found.modules["a.q"].keys["other"] == f"{ROOT}a.q.base_layer.other" and list(found.whole) == ["head.weight"] and not found.some


@pytest.mark.parametrize(
    ("keys", "error", "text"),
    [
        ([f"{ROOT}q.part", "q.other"], FormatError, "q.other: lacks the prefix that the others have"),
        ([f"{ROOT}q.part", f"{ROOT}q.base_layer.part"], FormatError, "the same tensor twice under two spellings"),
        ([f"{ROOT}q.wrong"], FormatError, "q.wrong: not a key peft writes"),
        ([f"{ROOT}stray.weight"], MatchError, "stray.weight: neither a tensor of the method nor"),
        ([f"{ROOT}head.original_module.weight"], FormatError, "the base's own tensor from a live state dict"),
    ],
)
def test_faults(keys: list[str], error: type[LoratoolsError], text: str) -> None:
    with pytest.raises(error) as caught:
        sort(keys, modules_to_save=["head"])
    assert text in str(caught.value)


def test_all_faults_are_told_together() -> None:
    with pytest.raises(LoratoolsError) as caught:
        sort([f"{ROOT}a.weight", f"{ROOT}q.wrong", f"{ROOT}b.weight"])
    assert len(str(caught.value).splitlines()) == 3


def test_a_list_of_whole_tensors_must_be_kept() -> None:
    assert sort([f"{ROOT}norm.weight"], {SAVED: '["norm.weight"]'}).some
    with pytest.raises(FormatError, match="listed among the saved tensors, and not in the file"):
        sort([f"{ROOT}norm.weight"], {SAVED: '["norm.weight", "norm.bias"]'})


def test_a_module_that_the_config_does_not_target() -> None:
    found = sort([f"{ROOT}k.part"])
    with pytest.raises(MatchError, match=r"k\.part: the config does not target this module.*found k, expected q"):
        check_targeted("k", found.modules["k"], parse(peft_config(target_modules=["q"])), nested=False)
