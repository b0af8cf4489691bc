"""Every kind has its name in the field."""

from __future__ import annotations

import pytest

from loratools.deltas.base import Delta
from loratools.deltas.terms import TERMS, term
from loratools.formats.native import classes

KINDS = {kind for one in classes().values() if issubclass(one, Delta) and isinstance(kind := one.kind, str)}


def test_every_kind_is_named() -> None:
    assert set(TERMS) >= KINDS and all(text.split(" ")[0] in ("a", "an") for text in TERMS.values())


@pytest.mark.parametrize(("kind", "text"), [("oft", "an OFT"), ("lora+loha", "a LoRA and a LoHa"), ("lately made", "a lately made")])
def test_kinds_read_as_the_field_writes_them(kind: str, text: str) -> None:
    assert term(kind) == text
