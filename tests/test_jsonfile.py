"""jsonfile: what is no object is named, what is no Unicode is kept, and keys are set where they stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratools.errors import FormatError
from loratools.jsonfile import read_json, with_values, write_json


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"[1]", "not a JSON object"), (b"{", "not readable as JSON"), (b"\xff", "not readable as JSON"), (b"[" * 100_000, "not readable")],
)  # fmt: skip
def test_what_is_no_object_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(FormatError, match=said) as caught:
        read_json(tmp_path / "x.json")
    assert "x.json" in str(caught.value)
    with pytest.raises(FormatError, match="cannot be read"):
        read_json(tmp_path / "none.json")


def test_written_it_is_read(tmp_path: Path) -> None:
    table = {"é": "ü", "half": "\udc80", "n": [1, 2.5, None]}
    write_json(tmp_path / "x.json", table)
    assert read_json(tmp_path / "x.json") == table
    assert "é" in (tmp_path / "x.json").read_text(encoding="utf-8") and json.loads((tmp_path / "x.json").read_bytes()) == table


def test_keys_are_set_where_they_stand() -> None:
    config = {"text_config": {"vocab_size": 17, "gone": 1}, "gone": 2, "kept": [1]}
    found = with_values(config, {"vocab_size": 19, "new": True, "gone": None})
    assert found == {"text_config": {"vocab_size": 19}, "kept": [1], "new": True}
    assert config == {"text_config": {"vocab_size": 17, "gone": 1}, "gone": 2, "kept": [1]}, "the given one is left as it is"
    assert with_values({"text_config": {"a": 1}, "a": 2}, {"a": 3}) == {"text_config": {"a": 1}, "a": 3}
