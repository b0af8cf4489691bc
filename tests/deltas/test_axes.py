"""Which axis of a stack A reads: peft's versions and transformers' models, one by one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from loratools.deltas.axes import required, turned_by
from loratools.families import TURNED_EXPERTS


@pytest.mark.parametrize(
    ("version", "types", "turned"),
    [
        ("0.17.0", ["mixtral"], True),
        ("0.18.1", [], True),
        ("0.19.0", ["mixtral"], True),
        ("0.19.0", ["gpt_oss"], False),
        ("0.19.1", ["mixtral"], False),
        ("0.19.1", ["gpt_oss"], True),
        ("0.21.2", ["llava", "mixtral"], False),
        ("0.21.3.dev0@abc123", ["aria", "aria_text"], True),
        ("1.0", ["mixtral"], False),
        ("0.18.2.dev0", ["mixtral"], True),
        ("0.21.2", [], None),
        ("0.19.0", [], None),
        ("0.19.0.dev0@abc", ["mixtral"], None),
        ("0.19.1.dev0", ["mixtral"], None),
        ("0.16.0", ["mixtral"], None),
        ("unknown", ["mixtral"], None),
        (None, ["mixtral"], None),
    ],
)
def test_the_version_and_the_model_tell(version: str | None, types: list[str], turned: bool | None) -> None:
    assert turned_by(version, types) is turned


@pytest.mark.parametrize(
    ("version", "types", "turned"),
    [
        ("0.18.0", ["gpt_oss"], True),
        ("0.19.0", ["mixtral"], True),
        ("0.19.0", ["gpt_oss"], None),
        ("0.21.2", ["mixtral"], False),
        ("0.21.2", ["aria", "aria_text"], None),
        ("0.21.2", [], None),
        (None, ["mixtral"], None),
    ],
)
def test_where_the_model_may_not_have_said_so_nothing_is_required(version: str | None, types: list[str], turned: bool | None) -> None:
    assert required(version, types) is turned


def test_the_models_stored_in_out_are_transformers_own() -> None:
    paths = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    found = {path.parent.name for path in paths if re.search(r"is_transposed\s*=\s*True", path.read_text())}
    assert found == {kind.removesuffix("_text") for kind in TURNED_EXPERTS}
