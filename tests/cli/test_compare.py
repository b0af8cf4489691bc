"""loratools compare: tables, the same numbers as JSON, what a base adds, a picture, and wrong usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli._adapters import llama_adapter, loratools


def test_the_table_and_the_document(tmp_path: Path) -> None:
    one, other = llama_adapter(tmp_path / "one", rank=2), llama_adapter(tmp_path / "other", rank=3, layers=1)
    found = loratools("compare", one, other)
    assert found.returncode == 0, found.stderr
    document = json.loads(loratools("compare", one, other, "--json").stdout)
    lines = [line.split(maxsplit=1) for line in found.stdout.splitlines() if line]
    assert ["cosine", f"{document['total']['cosine']:.6g}"] in lines
    assert "only in a  model.layers.1.self_attn.q_proj.weight, model.layers.1.self_attn.v_proj.weight" in found.stdout
    for row in document["modules"]:
        shown = next(line for line in lines if line[0] == row["name"].removesuffix(".weight"))
        assert shown[1].split()[:4] == ["2,", "3", f"{row['cosine']:.4g}", f"{row['relative_distance']:.4g}"]
    for row in document["layers"]:
        shown = next(line for line in lines if line[0] == row["layer"])
        assert shown[1].split()[:2] == [str(row["modules"]), "–" if row["cosine"] is None else f"{row['cosine']:.4g}"]


def test_with_a_base_and_a_picture(tmp_path: Path, base: Path) -> None:
    one, other = llama_adapter(tmp_path / "one", rank=2), llama_adapter(tmp_path / "other", rank=3)
    words = ("--base", base, "--top-k", 3, "--epsilon", 0.8)
    found = loratools("compare", one, other, *words, "--plot", tmp_path / "both.png")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads(loratools("compare", one, other, *words, "--json").stdout)["intruders"]
    told = document["a"]
    expected = f"intruders a      {told['intruders']} dimensions in {told['with_intruders']} of 4 modules (top 3, below 0.8)"
    assert told["intruders"] > 1 and expected in found.stdout
    assert f"a: left {100 * told['left_energy']:.2f} % (chance" in found.stdout
    rows = [row for row in document["modules"] if row["name"].endswith("layers.1.self_attn.v_proj.weight")]
    line = next(line for line in reversed(found.stdout.splitlines()) if line.startswith("model.layers.1.self_attn.v_proj "))
    assert line.split(maxsplit=1)[1].startswith(f"{rows[0]['intruders']}, {rows[1]['intruders']}  ")


WRONG = {
    "--top-k 3": "--top-k has no meaning without --base: found 3",
    "--epsilon 0.5": "--epsilon has no meaning without --base: found 0.5",
    "--base base --epsilon 2": "--epsilon: found 2.0, expected more than 0, at most 1",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_has_no_meaning_is_wrong_usage(words: str) -> None:
    found = loratools("compare", "no such adapter", "nor this", *words.split())
    assert found.returncode == 2 and WRONG[words] in found.stderr.replace("\n", " ")


def test_a_picture_of_another_kind_is_refused_before_work(tmp_path: Path) -> None:
    found = loratools("compare", "no such adapter", "nor this", "--plot", tmp_path / "both.gif")
    assert (found.returncode, found.stderr) == (2, "Error: --plot: found both.gif, expected a name that ends in .png or .svg or .pdf\n")
