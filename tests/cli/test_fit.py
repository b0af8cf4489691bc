"""loratools fit as a person sees it: what was done, the error beside the best possible, what went apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratools.cli import run
from loratools.cli._fitted import fitted
from loratools.formats import save
from loratools.workflows.fit import fit
from tests.workflows._adapters import MADE, base, folder


def test_what_was_done_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(MADE["patterns"](), tmp_path / "a")
    out = tmp_path / "out"
    assert run(["fit", str(tmp_path / "a"), "-o", str(out), "--for", "sglang", "--max-rank", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"fitted   {out}, for sglang",
        "held     3 of 3 deltas",
        "rank     1–4 before, 2 now",
        "scaling  0.75–16 before, 1 now",
    ]
    assert lines[4].startswith("error    0.") and "; the best possible at these ranks is 0." in lines[4]
    assert run(["check", str(out), "--for", "sglang"]) == 0


def test_nothing_lost_is_told(tmp_path: Path) -> None:
    receipt = fit(folder(tmp_path / "a"), tmp_path / "out", "vllm")
    lines = fitted(receipt, str(tmp_path / "out"), None)
    assert "error    none: every ΔW is what it was" in lines
    assert "rank     2" in lines and "scaling  2" in lines


def test_what_went_apart_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(MADE["saved"](), tmp_path / "a")
    assert run(["fit", str(tmp_path / "a"), "-o", str(tmp_path / "out"), "--for", "vllm"]) == 0
    told = capsys.readouterr()
    saved = tmp_path / "out.saved.safetensors"
    assert "apart    score.weight" in told.out.splitlines()
    assert told.err == (
        f"Note: a tensor that vLLM does not load with an adapter: in {saved}, to be merged into the base that it runs on: "
        f"loratools merge BASE {saved} -o MERGED\n"
    )


def test_json_is_the_receipt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fit", str(folder(tmp_path / "a")), "-o", str(tmp_path / "out"), "--for", "mlx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "loratools.json").read_text())


def test_a_dora_becomes_lora_with_its_base_and_not_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(MADE["dora on all"](), tmp_path / "a")
    words = ["fit", str(tmp_path / "a"), "-o", str(tmp_path / "out"), "--for", "vllm"]
    assert run(words) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and all("without W they would be lost; give --base" in line for line in told)
    assert run([*words, "--base", str(base(tmp_path / "base"))]) == 0
    assert "kind     dora to lora, 3 tensors" in capsys.readouterr().out.splitlines()


def test_a_narrow_terminal_gets_no_line_wider_than_itself(tmp_path: Path) -> None:
    save(MADE["patterns"](), tmp_path / "a")
    receipt = fit(tmp_path / "a", tmp_path / "out", "sglang", max_rank=1)
    lines = fitted(receipt, "out", 60)
    assert max(len(line) for line in lines if not line.startswith("receipt")) <= 60
