"""loratools convert: kinds, errors beside the best possible, and what is refused, as a person and as a program reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools as library
from loratools.cli import run
from tests.cli._adapters import llama_adapter
from tests.files import llama_config, llama_tensors, raw, read_adapter, write_adapter, write_checkpoint


class Line:
    """A command line run in this process: importing torch anew for each takes seconds."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: object) -> tuple[int, str, str]:
        code = run([str(word) for word in words])
        return code, *self.capsys.readouterr()


@pytest.fixture
def loratools(capsys: pytest.CaptureFixture[str]) -> Line:
    return Line(capsys)


def base_of(folder: Path) -> Path:
    return write_checkpoint(folder / "base", llama_tensors(), llama_config())


def told(text: str) -> dict[str, list[str]]:
    """The lines above the table by their labels."""
    lines = [line.partition("  ") for line in text.partition("\n\n")[0].splitlines()]
    found: dict[str, list[str]] = {}
    for label, _, rest in lines:
        found.setdefault(label, []).append(rest.strip())
    return found


def test_there_and_back_by_way_of_every_kind(tmp_path: Path, loratools: Line) -> None:
    base, lora = base_of(tmp_path), llama_adapter(tmp_path / "lora")
    dora, plain = tmp_path / "dora", tmp_path / "plain"
    code, text, _ = loratools("convert", lora, "-o", dora, "--kind", "dora", "--base", base)
    above = told(text)
    assert code == 0
    assert above["held"] == ["4 of 4 deltas"] and above["kind"] == ["lora to dora, 4 tensors"] and above["rank"] == ["2"]
    assert above["error"][0].endswith("of ‖W' − W‖ as stored; rounding alone") and above["receipt"] == [str(dora / "loratools.json")]

    # the magnitudes were W + ΔW's own norms, so W' − W is the LoRA's ΔW again, of rank 2
    for rank, error in ((2, "rounding alone"), (1, "the best possible at these ranks is ")):
        _, text, _ = loratools("convert", dora, "-o", plain, "--kind", "lora", "--base", base, "--rank", rank, "--overwrite")
        above = told(text)
        assert above["kind"] == ["dora to lora, 4 tensors"] and above["error"][0].partition("; ")[2].startswith(error)
        rows = json.loads((plain / "loratools.json").read_text())["tensors"]
        assert all((row["error"] < 1e-5) == (rank == 2) for row in rows)
    assert above["magnitudes"][0].endswith("of ‖W' − W‖ is their scaling of W itself, which has full rank")
    table = text.partition("\n\n")[2].splitlines()
    assert table[0].split() == ["module", "rank", "error", "best", "possible", "magnitudes", "share", "of", "change"] and len(table) == 5

    _, text, _ = loratools("convert", dora, "-o", tmp_path / "dense.safetensors", "--kind", "dense", "--base", base)
    assert told(text)["error"] == ["none: as stored it is what was computed"]


def test_another_axis_is_beside_what_factors_alone_leave(tmp_path: Path, loratools: Line) -> None:
    base = base_of(tmp_path)
    library.convert(llama_adapter(tmp_path / "lora"), tmp_path / "dora", kind="dora", base=base)
    tensors, config = read_adapter(tmp_path / "dora")
    moved = {key: tensor * (1 + 0.1 * torch.rand(tensor.shape)) if "magnitude" in key else tensor for key, tensor in tensors.items()}
    dora = write_adapter(tmp_path / "moved", moved, config)
    words = ["--magnitude-axis", "in", "--base", base, "--format", "loratools"]
    code, text, _ = loratools("convert", dora, "-o", tmp_path / "in.safetensors", *words)
    above = told(text)
    assert code == 0
    assert above["error"][0].endswith("as stored; no bound of the best is known")
    assert above["without m"][0].endswith("at best, with factors of these ranks alone")
    _, text, _ = loratools("inspect", tmp_path / "in.safetensors", "--base", base)
    assert "m/‖W‖−1 min" in text and "loratools, dora on 4 tensors" in text


def test_a_change_of_format_keeps_all_and_says_so(tmp_path: Path, loratools: Line) -> None:
    lora, out = llama_adapter(tmp_path / "lora"), tmp_path / "own.safetensors"
    _, text, _ = loratools("convert", lora, "-o", out, "--format", "loratools")
    assert told(text)["kept"] == ["4 tensors, byte for byte"] and "error" not in told(text)
    loratools("convert", out, "-o", tmp_path / "again", "--format", "peft")
    before, after = read_adapter(lora)[0], read_adapter(tmp_path / "again")[0]
    assert {key: raw(tensor) for key, tensor in before.items()} == {key: raw(tensor) for key, tensor in after.items()}


def test_json_is_the_receipt_and_what_the_function_returns(tmp_path: Path, loratools: Line) -> None:
    base, lora = base_of(tmp_path), llama_adapter(tmp_path / "lora")
    words = ["--kind", "dora", "--base", base, "--threads", 1, "--sha256", "--json"]
    receipt = json.loads(loratools("convert", lora, "-o", tmp_path / "out", *words)[1])
    assert receipt == json.loads((tmp_path / "out" / "loratools.json").read_text())
    called = library.convert(lora, tmp_path / "called", kind="dora", base=base, threads=1, sha256=True)
    differ = {key for key in receipt if receipt[key] != called[key]}
    assert differ <= {"arguments", "seconds"} and all("sha256" in row for row in receipt["outputs"])


def test_refusals_are_a_line_each(tmp_path: Path, loratools: Line) -> None:
    library.convert(llama_adapter(tmp_path / "lora"), tmp_path / "dora", kind="dora", base=base_of(tmp_path))
    code, text, errors = loratools("convert", tmp_path / "dora", "-o", tmp_path / "out", "--kind", "lora", "--rank", 2)
    assert (code, text) == (1, "") and not (tmp_path / "out").exists()
    lines = errors.splitlines()
    assert len(lines) == 4 and all(line.startswith("Error: ") and "give --base" in line for line in lines)
    assert loratools("convert", tmp_path / "dora", "-o", tmp_path / "out", "--kind", "lora", "--rank", 0)[0] == 2
    for wrong in (("--kind", "loha"), ("--magnitude-axis", "rows")):
        assert loratools("convert", tmp_path / "dora", "-o", tmp_path / "out", *wrong)[0] == 2


def test_notes_are_told_unless_quiet(tmp_path: Path, loratools: Line) -> None:
    base = write_checkpoint(tmp_path / "base", {f"wrapped.{name}": W for name, W in llama_tensors().items()}, llama_config())
    lora = llama_adapter(tmp_path / "lora")
    assert "prefix 'wrapped.' added" in loratools("convert", lora, "-o", tmp_path / "one", "--base", base)[2]
    assert loratools("convert", lora, "-o", tmp_path / "two", "--base", base, "--quiet")[2] == ""


def test_a_layout_needs_no_base(tmp_path: Path, loratools: Line) -> None:
    word = "lora_unet_single_blocks_0_linear1"
    factors = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(28, 2), "alpha": torch.tensor(2.0)}
    tensors = {f"{word}.{suffix}": value for suffix, value in factors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    code, text, notes = loratools("convert", tmp_path / "a.safetensors", "-o", tmp_path / "b.safetensors", "--format", "diffusers")
    assert code == 0 and told(text)["held"] == ["1 of 1 deltas"]
    assert "layout diffusers: 1 of 1 names are the other side's (flux, diffusers 0.42); 1 tensors are 4 there" in notes
    root = "transformer.single_transformer_blocks.0"
    names = {*(f"{root}.attn.to_{part}.weight" for part in "qkv"), f"{root}.proj_mlp.weight"}
    assert set(library.load(tmp_path / "b.safetensors")) == names
    words = ["--format", "kohya", "--layout", "original"]
    assert loratools("convert", tmp_path / "b.safetensors", "-o", tmp_path / "c.safetensors", *words)[0] == 0
    found = load_file(tmp_path / "c.safetensors")
    assert set(found) == set(tensors) and all(raw(value) == raw(tensors[key]) for key, value in found.items())
    code, _, error = loratools("convert", tmp_path / "a.safetensors", "-o", tmp_path / "d.safetensors", "--layout", "bfl")
    assert code == 2 and "bfl" in error
