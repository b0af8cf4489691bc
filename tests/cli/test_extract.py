"""loratools extract as a user sees it: errors beside the best possible, overall and for the worst modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli._adapters import loratools as run
from tests.conftest import llama_config, llama_tensors
from tests.files import read_adapter, read_checkpoint, write_checkpoint


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """The tiny Llama and a full fine-tune of it."""
    tensors = llama_tensors()
    generator = torch.Generator().manual_seed(5)
    tuned = {name: tensor + torch.randn(tensor.shape, generator=generator) / 50 for name, tensor in tensors.items()}
    return write_checkpoint(tmp_path / "base", tensors, llama_config()), write_checkpoint(tmp_path / "tuned", tuned, llama_config())


def test_the_error_overall_is_that_of_the_files(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    assert run("extract", base, tuned, "-o", tmp_path / "adapter", "--rank", 2).returncode == 0
    text = run("extract", base, tuned, "-o", tmp_path / "again", "--rank", 2, "-q").stdout
    assert run("merge", base, tmp_path / "adapter", "-o", tmp_path / "merged").returncode == 0
    W, T, M = (read_checkpoint(folder) for folder in (base, tuned, tmp_path / "merged"))
    change = sum((T[name].double() - W[name].double()).square().sum() for name in W) ** 0.5
    error = sum((T[name].double() - M[name].double()).square().sum() for name in W) ** 0.5 / change
    facts = {line[:11].strip(): line[11:] for line in text.splitlines()}
    told, best = _numbers(facts["error"])
    # four digits are shown, and the merge rounds a second time, to float32, 1e-7 of a weight
    assert told == pytest.approx(float(error), rel=2e-4)
    assert best <= told * (1 + 1e-3)
    assert facts["held"] == "17 of 17 changed tensors, 3 of them whole"


def _numbers(text: str) -> tuple[float, float]:
    return float(text.split()[0]), float(text.split()[-1])


def test_the_worst_modules_come_first(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    text = run("extract", *pair, "-o", tmp_path / "adapter", "--rank", 1).stdout
    rows = [line.split() for line in text[text.index("worst modules") :].splitlines()[1:]]
    receipt = json.loads((tmp_path / "adapter" / "loratools.json").read_text())
    worst = sorted((row for row in receipt["tensors"] if row["rank"]), key=lambda row: -row["error"])[:5]
    assert [row[0] for row in rows] == [row["name"].removesuffix(".weight") for row in worst]
    assert [row[2] for row in rows] == [f"{row['error']:.4g}" for row in worst]


def test_shares_add_up_to_all_of_the_change(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    run("extract", *pair, "-o", tmp_path / "adapter", "--rank", 1, "--exclude", "*mlp*", "--rest", "drop")
    receipt = json.loads((tmp_path / "adapter" / "loratools.json").read_text())
    shares = [row["share"] for row in receipt["tensors"] + receipt["left_out"]]
    assert sum(shares) == pytest.approx(1, abs=1e-12)  # a sum of 17 doubles
    assert receipt["left_out"]


def test_what_is_left_out_is_told_with_its_share(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    text = run("extract", *pair, "-o", tmp_path / "adapter", "--rank", 1, "--exclude", "*mlp*").stdout
    (line,) = [line for line in text.splitlines() if line.startswith("left out")]
    assert "model.layers.{0,1}.mlp.down_proj.weight, model.layers.{0,1}.mlp.up_proj.weight: " in line
    assert line.endswith("% of the change's energy")


def test_options_reach_the_function(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    arguments = (
        "--rank",
        2,
        "--alpha",
        8,
        "--dtype",
        "bf16",
        "--include",
        "*q_proj*",
        "--include",
        "*k_proj*",
        "--seed",
        3,
        "--sha256",
        "--json",
    )
    found = run("extract", *pair, "-o", tmp_path / "adapter", *arguments)
    receipt = json.loads(found.stdout)
    assert receipt["arguments"] | {"rank": 2, "alpha": 8.0, "include": ["*q_proj*", "*k_proj*"], "seed": 3} == receipt["arguments"]
    tensors, config = read_adapter(tmp_path / "adapter")
    assert config["lora_alpha"] == 8 and all(tensor.dtype == torch.bfloat16 for tensor in tensors.values()) and len(tensors) == 8


@pytest.mark.parametrize(
    ("code", "arguments"),
    [(1, ("--size", "1B")), (1, ("--rank", 2, "--device", "nowhere")), (2, ("--energy", 2)), (2, ("--size", "4 cubits"))],
)
def test_options_that_make_no_sense_are_faults_and_leave_nothing(
    tmp_path: Path, pair: tuple[Path, Path], code: int, arguments: tuple[object, ...]
) -> None:
    found = run("extract", *pair, "-o", tmp_path / "rooms" / "adapter", *arguments)
    assert (found.returncode, found.stdout) == (code, "")
    assert found.stderr.startswith("Error: ") and "Traceback" not in found.stderr
    assert not (tmp_path / "rooms").exists() or not list((tmp_path / "rooms").iterdir())


def test_a_picture_comes_with_it_and_one_of_another_kind_is_refused_before_work(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    found = run("extract", *pair, "-o", tmp_path / "adapter", "--rank", 2, "--plot", tmp_path / "x.png")
    assert found.returncode == 0 and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    other = run("extract", "no base", "no tune", "-o", tmp_path / "other", "--rank", 2, "--plot", tmp_path / "x.jpg")
    assert (other.returncode, other.stderr) == (2, "Error: --plot: found x.jpg, expected a name that ends in .png or .svg or .pdf\n")
    inside = run("extract", *pair, "-o", tmp_path / "other", "--rank", 2, "--plot", tmp_path / "other" / "x.png")
    assert inside.returncode == 2 and "expected a file that is not the output or in it" in inside.stderr
    assert not (tmp_path / "other").exists()
