"""The tutorials' systems in examples/, run with --quick as a person would run them: what they print must be true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBER = r"([\d.e+-]+)"


def run(name: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", str(EXAMPLES / name), "--quick"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(value) for value in re.findall(pattern.replace("#", NUMBER), text)]


def test_mlp_digits() -> None:
    said = run("mlp_digits.py")
    original = numbers("original +test accuracy #", said)[0]
    assert original > 0.7  # ten classes: chance is 0.1
    assert numbers("before training: accuracy #", said) == [original, original]
    assert all(accuracy > original - 0.05 for accuracy in numbers("(?:LoRA|DoRA) +test accuracy #", said))
    assert re.findall(r"trains (.*)", said)[0] == "0.lora_A, 0.lora_B, 2.lora_A, 2.lora_B, 4.lora_A, 4.lora_B"
    assert "4.magnitude" in said
    assert max(numbers("merged form differ by #", said)) < 1e-5  # float32
    assert numbers("LinearWithDoRA differs by #:", said)[0] > 0.01


def test_scratch_convention() -> None:
    said = run("scratch_convention.py")
    assert max(numbers("own forward differ by #", said)) < 1e-5 and said.count("own forward differ") == 2  # float32
    assert "to PEFT and back, the same bytes: True" in said
    refusals = re.findall(r"refused: (.*)", said)
    assert len(refusals) == 3
    assert "layers.0.m" in refusals[0] and "no weight edit" in refusals[0]
    assert "--scratch-dora" in refusals[1]
    assert "layers.0.weight" in refusals[2] and "axis" in refusals[2]


@pytest.mark.slow
def test_selective_bert() -> None:
    said = run("selective_bert.py")
    counts = {row: int(count) for row, count in re.findall(r"^(\S.*?) +(\d+) parameters trained", said, re.MULTILINE)}
    head = 384 * 64 + 64 + 64 * 2 + 2
    query_value, mlp = 6 * 2 * 8 * (384 + 384), 6 * 2 * 8 * (384 + 1536)
    assert list(counts.values()) == [head + query_value + mlp, counts["full fine-tune"], head + query_value, head]
    assert counts["full fine-tune"] > 22_000_000
    assert all(0 <= accuracy <= 1 for accuracy in numbers("accuracy #", said))


def test_cost_of_layers() -> None:
    lines = run("cost_of_layers.py").splitlines()
    rows = [re.split(r" {2,}", re.sub(" (plain|LoRA) ", r"  \1  ", line)) for line in lines]
    cpu = {(row[0], row[1]): row[2:] for row in rows if len(row) == 10}
    counts = {key: [int(value) for value in (row[3], row[4], row[7])] for key, row in cpu.items()}
    # weights, those that train, multiply-adds of a forward: by hand
    assert counts["Conv1d(16, 33, 3)", "plain"] == [1617, 1617, 20 * 48 * 33 * 16 * 3]
    assert counts["Conv1d(16, 33, 3)", "LoRA"] == [1617 + 324, 324, 20 * 48 * (33 * 16 * 3 + 4 * 16 * 3 + 33 * 4)]
    assert counts["Conv2d(16, 64, 3)", "LoRA"] == [9280 + 832, 832, 20 * 48 * 98 * (64 * 144 + 4 * 144 + 64 * 4)]
    assert counts["Linear(200, 500)", "LoRA"] == [100500 + 11200, 11200, 100 * (200 * 500 + 16 * 700)]
    assert all(float(value) > 0 for row in cpu.values() for value in row[:3])


def test_loralib_checkpoint() -> None:
    said = run("loralib_checkpoint.py")
    assert "24 lora" in said and "4 replacement" in said and "rank 8, alpha 16, scaling 2" in said
    assert "and back: 52 of 52 tensors have the same bytes" in said


def test_peft_config() -> None:
    said = run("peft_config.py")
    assert "4 layers, 2048 of" in said  # two layers' q_proj and v_proj, 4·(64 + 64) each
    assert "{'r': 4, 'lora_alpha': 16, 'lora_dropout': 0.05, 'bias': 'none'" in said
    before, after = numbers("(?:loss|step) #", said.replace(",", ""))
    assert after < before
    assert numbers("in PEFT differ by #", said)[0] < 1e-5  # float32


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
