"""An adapter shown: its table in a terminal, in a notebook and by rich, without a tensor read and without torch or rich where not asked."""

from __future__ import annotations

import subprocess
import sys
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console

from loratools.adapter import Adapter
from loratools.deltas.full import Full
from loratools.formats import load
from loratools.listing import ROWS
from loratools.tensors import to_ref
from tests.cli._adapters import ROOT, environment, llama_adapter
from tests.ops._lora import low


def many(count: int) -> Adapter:
    """Modules that no pattern draws together."""
    return Adapter({f"m{index:03}.weight": low((4, 3), 1, index) for index in range(count)})


def test_repeated_layers_share_a_row(tmp_path: Path) -> None:
    folder = llama_adapter(tmp_path / "adapter", layers=12)
    assert repr(load(folder)).splitlines() == [
        f"Adapter: 24 tensors, 672 parameters, lora, peft, {folder / 'adapter_model.safetensors'}",
        "module                                  ×  kind  shape  rank  alpha  scaling  dtype  parameters",
        "model.layers.{0..11}.self_attn.q_proj  12  lora  8 × 8     2      4        2  F32           384",
        "model.layers.{0..11}.self_attn.v_proj  12  lora  4 × 8     2      4        2  F32           288",
    ]


def test_what_differs_has_a_row_of_its_own_and_empty_columns_none() -> None:
    bias = Full(diff=to_ref(torch.ones(3)), scale=1.0)
    lines = repr(Adapter({"h.0.q.weight": low((4, 3), 1, 0), "h.1.q.weight": low((4, 3), 2, 0), "h.0.q.bias": bias})).splitlines()
    assert lines[0] == "Adapter: 3 tensors, 24 parameters, lora on 2, full on 1"
    assert [line.split()[0] for line in lines[1:]] == ["module", "h.0.q.bias", "h.0.q", "h.1.q"] and "×" not in lines[1].split()
    only = repr(Adapter({"q.bias": bias}))
    assert only.splitlines()[1].split() == ["module", "kind", "shape", "scaling", "dtype", "parameters"]
    assert repr(Adapter({})) == "Adapter: 0 tensors, 0 parameters"


def test_at_most_twenty_rows() -> None:
    assert len(repr(many(ROWS)).splitlines()) == ROWS + 2 and "more" not in repr(many(ROWS))
    lines = repr(many(ROWS + 30)).splitlines()
    assert len(lines) == ROWS + 2 and lines[-1] == "… and 31 more rows" and lines[-2].startswith("m018 ")


def test_a_notebook_gets_a_table_with_everything_escaped() -> None:
    text = Adapter({"<b>.weight": low((4, 3), 1, 0)}, path=Path("<i>&.safetensors"), format="peft")._repr_html_()
    assert "<td>&lt;b&gt;</td>" in text and "&lt;i&gt;&amp;.safetensors" in text and "<b>" not in text and "<i>" not in text
    assert text.count("<tr>") == 2 and text.count("<td") == text.count("<th>") + text.count("<th ")
    assert "<p>… and 31 more rows</p>" in many(ROWS + 30)._repr_html_() and "<table>" not in Adapter({})._repr_html_()


def test_rich_prints_the_same_and_takes_no_name_for_markup() -> None:
    out = StringIO()
    Console(file=out, width=140).print(Adapter({"[red]q.weight": low((4, 3), 1, 0)}))
    assert "[red]q" in out.getvalue() and "4 × 3" in out.getvalue() and "1 tensor, 7 parameters" in out.getvalue()
    out = StringIO()
    Console(file=out, width=140).print(many(ROWS + 30))
    assert "… and 31 more rows" in out.getvalue()


def test_no_torch_and_no_rich_is_imported_for_it(tmp_path: Path) -> None:
    folder = llama_adapter(tmp_path / "adapter")
    asked = f"a = loratools.load({str(folder)!r}); repr(a), a._repr_html_()"
    code = f"import sys, loratools; {asked}; print({{'torch', 'rich'}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT, check=True)
    assert found.stdout == "set()\n"
