"""The document of a report: its policy names its own scripts, its data cannot leave their element, the same data give the same bytes."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re

import pytest

from loratools.workflows._report.page import HERE, SCRIPTS, embedded, page


def test_the_policy_names_the_scripts_by_their_digests() -> None:
    text = page({"names": []}, "title")
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert found
    policy = html.unescape(found[1])
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(digests) == 2 and re.findall(r"'sha256-([^']+)'", policy) == digests
    assert policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy


def test_every_script_of_the_folder_is_in_it() -> None:
    assert {path.name for path in HERE.glob("*.js")} == set(SCRIPTS)
    text = page({}, "title")
    assert all((HERE / name).read_text(encoding="utf-8") in text for name in (*SCRIPTS, "page.css"))


def test_no_script_writes_markup() -> None:
    for name in SCRIPTS:
        code = re.sub(r"//.*", "", (HERE / name).read_text(encoding="utf-8"))
        assert not re.search(r"(inner|outer|Adjacent)HTML|document\.write|\beval\b|new Function|fetch\(|XMLHttpRequest", code), name


def test_the_same_data_give_the_same_bytes() -> None:
    data = {"names": ["a", "b"], "x": 1 / 3}
    assert page(data, "t") == page(dict(data), "t")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00012345678, "0.0001235"), (2.0, "2"), (-0.0, "0"), (123456.0, "123500"), (1e30, "1e+30"), (float("inf"), "null"),
        (True, "true"), (7, "7"), (None, "null"), ("a\u2029b", '"a\\u2029b"'), (("x", [1.0]), '["x",[1]]'), ({1: "é"}, '{"1":"é"}'),
    ],
)  # fmt: skip
def test_values_as_they_are_embedded(value: object, text: str) -> None:
    assert embedded(value) == text
    json.loads(embedded(value))


def test_a_name_that_is_no_unicode_is_written_all_the_same() -> None:
    assert embedded("a\udcff").encode("utf-8") == b'"a\\udcff"'


def test_what_looks_like_a_place_in_the_template_stays_text() -> None:
    text = page({"names": ["@@style@@"]}, "@@data@@")
    assert "<title>@@data@@</title>" in text and '{"names":["@@style@@"]}' in text
