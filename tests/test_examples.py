"""The scripts in examples/, run as a person would run them, on small files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from tests.files import llama_config, llama_tensors, peft_config, write_adapter, write_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """base/, tuned/, two adapters of rank 2, adapter/ and style/."""
    generator = torch.Generator().manual_seed(1)
    base = llama_tensors()
    tuned = {name: W + 0.1 * torch.randn(W.shape, generator=generator) for name, W in base.items()}
    write_checkpoint(tmp_path / "base", base, llama_config())
    write_checkpoint(tmp_path / "tuned", tuned, llama_config())
    for name, module in (("adapter", Q), ("style", UP)):
        rows, columns = base[f"{module}.weight"].shape
        root = f"base_model.model.{module}"
        A, B = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
        config = peft_config(target_modules=[module.rpartition(".")[2]], layers_to_transform=[int(module.split(".")[2])])
        write_adapter(tmp_path / name, {f"{root}.lora_A.weight": A, f"{root}.lora_B.weight": B}, config)
    return tmp_path


def run(room: Path, name: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(EXAMPLES / name), *arguments], cwd=room, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_extract_and_merge(room: Path) -> None:
    """At full rank (8 columns) nothing is lost but float32 rounding."""
    lines = run(room, "extract_and_merge.py", "base", "tuned", "out", "8").splitlines()
    assert lines[-2] == "applied {0} of {0} changes".format(len(llama_tensors()))
    assert lines[-1] == "‖merged − tuned‖ is 0.00% of ‖tuned − base‖"
    worse = run(room, "extract_and_merge.py", "base", "tuned", "worse", "1").splitlines()[-1]
    assert 10 < float(worse.split()[4].rstrip("%")) < 100
    assert (room / "out/merged/loratools.json").is_file()
    assert (room / "out/adapter/loratools.json").is_file()


def test_strengths(room: Path) -> None:
    lines = run(room, "strengths.py", "base", "adapter", "style", "out").splitlines()
    told = [line for line in lines if line.startswith("style at")]
    assert [line.split(",")[0] for line in told] == [f"style at {strength}: applied 2 of 2" for strength in (0.0, 0.5, 1.0)]
    changes = [float(line.rpartition(" ")[2]) for line in told]
    assert changes == sorted(changes)


def test_a_folder_of_adapters_in_another_format(room: Path) -> None:
    zoo = room / "zoo"
    for name, place in (("adapter", "one"), ("style", "inner/two"), ("style", "one/later")):
        shutil.copytree(room / name, zoo / place)
    weights = load_file(room / "adapter" / "adapter_model.safetensors")
    kohya = {f"lora_unet_{Q.replace('.', '_')}.{new}.weight": weights[f"base_model.model.{Q}.{old}.weight"]
             for old, new in (("lora_A", "lora_down"), ("lora_B", "lora_up"))}  # fmt: skip
    for name in ("three.safetensors", "three.pt"):
        (save_file if name.endswith("s") else torch.save)(kohya, zoo / name)
    (zoo / "one" / "styles").mkdir()
    save_file(kohya, zoo / "one" / "styles" / "below.safetensors")  # of no adapter above it
    (zoo / "broken.safetensors").write_bytes(b"\0" * 16)
    words = [sys.executable, str(EXAMPLES / "convert_folder.py"), "zoo", "out", "--format", "loratools", "--base", "base"]
    done = subprocess.run(words, cwd=room, capture_output=True, encoding="utf-8")
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and done.stderr == ""
    assert sorted(line.split()[1].rstrip(":") for line in lines if line.startswith("converted")) == [
        "inner/two", "one", "one/later", "one/styles/below.safetensors", "three.pt", "three.safetensors",
    ]  # fmt: skip
    assert [line for line in lines if line.startswith("failed     broken.safetensors: ")] and lines[-1] == "6 of 7 adapters are in out"
    made = {place: loratools.load(room / "out" / place) for place in ("one", "inner/two", "three-pt", "three-safetensors")}
    assert list(made["three-pt"]) == list(made["one"]) == [f"{Q}.weight"]
    again = subprocess.run(words, cwd=room, capture_output=True, encoding="utf-8").stdout.splitlines()
    assert [line.split()[0] for line in again[:-1]].count("there") == 6
    lost = subprocess.run([*words[:2], "zo", "out2", "--format", "peft"], cwd=room, capture_output=True, encoding="utf-8")
    assert lost.returncode == 2 and "zo is not a folder" in lost.stderr and not (room / "out2").exists()


def test_every_example_is_run_by_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tests] == []
