"""The page of a report: one HTML file that asks nothing of any network, its data escaped, its scripts named by their digests.

What the browser runs and shows is in files of its own here: page.html, page.css, and the scripts in the order of SCRIPTS. The
charts are Apache ECharts' (`_vendor/echarts`).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHARTS = HERE.parent / "_vendor" / "echarts" / "charts.min.js"
SCRIPTS = ("dom.js", "colours.js", "summary.js", "table.js", "heatmap.js", "detail.js", "modules.js", "compare.js", "main.js")
DIGITS = 4  # significant digits of a number in the page
# inside a script element `<` could end it or open a comment; U+2028 and U+2029 end a line in older JavaScript
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def page(data: Mapping[str, Any], title: str) -> str:
    """The whole document. The same data give the same bytes.

    Nothing but its own scripts runs in it, and it may load nothing: its Content-Security-Policy says so.
    """
    charts = CHARTS.read_text(encoding="ascii").rstrip("\n")
    own = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    own = f'(() => {{\n"use strict";\n{own}}})();'
    policy = (
        f"default-src 'none'; script-src {_source(charts)} {_source(own)}; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "title": html.escape(title), "policy": html.escape(policy, quote=False), "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "charts": charts, "data": embedded(data), "script": own,
    }  # fmt: skip
    pieces = (HERE / "page.html").read_text(encoding="utf-8").split("@@")  # so that what is put in is never looked at again
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def embedded(value: Any) -> str:
    """JSON that may stand in a script element: with escapes for what HTML or JavaScript would read otherwise.

    >>> print(embedded({"</script>": 0.123456}))
    {"\\u003c/script\\u003e":0.1235}
    """
    text = json.dumps(_short(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # half a surrogate pair, as in a file's name that is no Unicode, has no UTF-8
    return text.translate(_ESCAPES).encode("utf-8", "backslashreplace").decode("utf-8")


def _short(value: Any) -> Any:
    """The value with fewer digits, and null for inf and nan, which JSON has not."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.{DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 1e15 else short
    if isinstance(value, Mapping):
        return {str(key): _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list | tuple) else value


def _source(script: str) -> str:
    """What a policy calls a script: the digest of its text (Content Security Policy Level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
