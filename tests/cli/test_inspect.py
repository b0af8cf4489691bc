"""loratools inspect as a user sees it: the table, its widths, and --json."""

from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loratools
from loratools.cli._inspected import _dimensions, _scaling, shown
from tests.cli._adapters import ROOT, command, environment, llama_adapter
from tests.cli._adapters import loratools as run
from tests.files import peft_config, write_adapter, write_checkpoint, write_pipeline


def test_the_table_of_an_adapter(tmp_path: Path, base: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter", base_model_name_or_path="org/tiny")
    found = run("inspect", adapter, "--base", base)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.splitlines() == [
        f"adapter     {adapter}",
        "format      peft, lora on 4 tensors",
        "base        org/tiny",
        "rank        2",
        "scaling     2 = alpha 4 / rank 2",
        "parameters  112 in 4 tensors",
        "trainable   8.59 % of 1,304, the base's 1,192 among them",
        f"on disk     {size / 1000:.2f} kB, F32",
        "",
        "module                               ×  shape  parameters",
        "model.layers.{0,1}.self_attn.q_proj  2  8 × 8          64",
        "model.layers.{0,1}.self_attn.v_proj  2  4 × 8          48",
    ]


def test_the_literal_from_the_command_line(tmp_path: Path) -> None:
    tensors = {"base_model.model.fc.lora_A.weight": torch.zeros(8, 10000), "base_model.model.fc.lora_B.weight": torch.zeros(5000, 8)}
    adapter = write_adapter(tmp_path / "adapter", tensors, peft_config(r=8, lora_alpha=8, target_modules=["fc"]))
    base = write_checkpoint(tmp_path / "base", {"fc.weight": torch.zeros(5000, 10000, dtype=torch.bfloat16)})
    text = run("inspect", adapter, "--base", base).stdout
    assert "parameters  120,000 in 1 tensor\n" in text and "the base's 50,000,000 among them" in text and "0.24 % of" in text
    report = json.loads(run("inspect", adapter, "--base", base, "--json").stdout)
    assert (report["parameters"], report["base_parameters"]) == (120_000, 50_000_000)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([(8.0, 6, 8 / (6 + 1e-5))], "1.333 = alpha 8 / rank 6"),  # AdaLoRA's own epsilon is no rsLoRA
        ([(8.0, 4, 8 / (6 + 1e-5))], "1.333 of alpha 8 and rank 4, by its method"),  # pruned from 6
        ([(8.0, 4, 8 / (6 + 1e-5)), (8.0, 0, 8 / (6 + 1e-5))], "1.333 of alpha 8, by its method"),
        ([(4.0, 1, 4.0)], "4 = alpha 4 / rank 1"),
        ([(4.0, 4, 2.0)], "2 = alpha 4 / √4 (rsLoRA)"),
        ([(4.0, 4, 2.0), (4.0, 2, 2.0)], "2 = alpha / rank, or alpha / √rank (rsLoRA), alpha 4"),
    ],
)
def test_the_rule_of_a_scaling_is_the_one_it_has(rows: list[tuple[float, int, float]], line: str) -> None:
    assert _scaling([{"alpha": alpha, "rank": rank, "scaling": scaling} for alpha, rank, scaling in rows]) == line


def test_a_scaling_that_only_the_base_tells_is_left_out() -> None:
    stack = {"name": "experts.down", "kind": "parameter", "shape": [], "rank": 2, "alpha": 4.0, "scaling": None}
    stack |= {"parameters": 8, "dtype": "F32"}
    low = stack | {"name": "q.weight", "kind": "lora", "shape": [4, 4], "scaling": 2.0}
    assert _scaling([stack, low]) == "2 = alpha 4 / rank 2"
    report = {
        "path": "a", "format": "peft", "kinds": {"parameter": 1}, "base_model": None, "modules": [stack], "modules_total": 1,
        "parameters": 8, "base_parameters": None, "trainable_percent": None, "bytes": 8, "ranks": {"2": 1}, "values_checked": False,
        "warnings": [],
    }  # fmt: skip
    assert not [line for line in shown(report, None) if line.startswith("scaling")]


def test_a_shape_that_only_the_base_tells_is_no_scalar() -> None:
    assert _dimensions({"shape": [], "parameters": 64}) == "–" and _dimensions({"shape": [], "parameters": 1}) == "scalar"
    assert _dimensions({"shape": [2, 3], "parameters": 6}) == "2 × 3"


def test_all_gives_every_module_a_row_and_layers_in_their_order(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter", layers=12)
    lines = run("inspect", adapter, "--all").stdout.splitlines()
    names = [line.split()[0] for line in lines[lines.index("") + 2 :]]
    assert names == [f"model.layers.{layer}.self_attn.{name}" for layer in range(12) for name in ("q_proj", "v_proj")]


@pytest.mark.parametrize("options", [(), ("--values",), ("--spectra",)])
def test_json_is_what_the_function_returns(tmp_path: Path, base: Path, options: tuple[str, ...]) -> None:
    adapter = llama_adapter(tmp_path / "adapter")
    found = run("inspect", adapter, "--base", base, "--json", *options)
    words = {option.removeprefix("--"): True for option in options}
    assert json.loads(found.stdout) == loratools.inspect(adapter, base=base, **words)


def test_columns_only_for_what_differs(tmp_path: Path) -> None:
    tensors = {}
    for module, rank, dtype in (("a", 4, torch.float32), ("b", 2, torch.bfloat16)):
        tensors |= {f"base_model.model.{module}.lora_A.weight": torch.ones(rank, 8, dtype=dtype)}
        tensors |= {f"base_model.model.{module}.lora_B.weight": torch.ones(8, rank, dtype=dtype)}
    tensors["base_model.model.head.weight"] = torch.ones(3, 8)
    config = peft_config(r=4, rank_pattern={"b": 2}, lora_alpha=4, use_rslora=True, target_modules=["a", "b"], modules_to_save=["head"])
    text = run("inspect", write_adapter(tmp_path / "adapter", tensors, config)).stdout
    assert "rank        2 to 4: 2 (1×), 4 (1×)" in text
    assert "scaling     2–2.828 = alpha / √rank (rsLoRA), alpha 4" in text
    table = text[text.index("\n\n") + 2 :].splitlines()
    assert table == [
        "module  kind         shape  rank  scaling  dtype  parameters",
        "a       lora         8 × 8     4        2  F32            64",
        "b       lora         8 × 8     2    2.828  BF16           32",
        "head    replacement  3 × 8     –        –  F32            24",
    ]


def test_warnings_of_single_modules_are_drawn_together(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter", layers=6, lora_alpha=0)
    text = run("inspect", adapter).stdout
    assert "warning  model.layers.{0..5}.self_attn.q_proj, model.layers.{0..5}.self_attn.v_proj: alpha is 0, so it changes nothing" in text
    assert len(loratools.inspect(adapter)["warnings"]) == 12


def test_more_than_ten_warnings_are_counted(tmp_path: Path) -> None:
    tensors = {}
    for index in range(13):
        A = torch.ones(2, 8)
        A.view(-1)[: index + 1] = math.nan  # as many as make each warning another
        tensors |= {f"base_model.model.m{index}.q.lora_A.weight": A, f"base_model.model.m{index}.q.lora_B.weight": torch.ones(4, 2)}
    adapter = write_adapter(tmp_path / "adapter", tensors, peft_config(target_modules=["q"]))
    lines = run("inspect", adapter, "--values").stdout.splitlines()
    assert sum(line.startswith("warning") for line in lines) == 10
    assert lines[-1].strip() == "and 3 more; --json has them all"


def test_the_table_of_a_checkpoint(base: Path) -> None:
    lines = run("inspect", base).stdout.splitlines()
    assert lines[:3] == [f"checkpoint  {base}", "parameters  1,192 in 17 tensors", lines[2]] and lines[2].startswith("on disk     ")
    assert "model.layers.{0,1}.self_attn.k_proj.weight  2   4 × 8          64" in lines


@pytest.mark.parametrize(("columns", "spectra"), [(60, False), (80, False), (80, True), (100, True), (160, True)])
def test_nothing_is_wider_than_the_terminal(tmp_path: Path, columns: int, spectra: bool) -> None:
    report = loratools.inspect(llama_adapter(tmp_path / "adapter"), spectra=spectra)
    wide = [line for line in shown(report, columns) if len(line) > columns]
    assert all(line.strip().startswith("model.layers") and " " not in line.strip() for line in wide)


def test_in_a_terminal_there_are_colours_and_in_a_pipe_none(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter")
    near, far = pty.openpty()
    process = subprocess.Popen(command("inspect", adapter), stdout=far, env=environment() | {"COLUMNS": "80", "TERM": "xterm"})
    os.close(far)
    seen = b""
    try:
        while chunk := os.read(near, 4096):
            seen += chunk
    except OSError:  # Linux says so when the last writer of a terminal has closed it
        pass
    assert process.wait(60) == 0
    assert b"\x1b[1m" in seen and b"q_proj" in seen
    assert "\x1b" not in run("inspect", adapter).stdout


def test_python_m_and_the_function_main_are_one(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter")
    code = f"import sys; sys.argv = ['loratools', 'inspect', {str(adapter)!r}]; from loratools.cli import main; main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert found.stdout == run("inspect", adapter).stdout


def test_a_pipeline_is_told_by_its_models(tmp_path: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "x"}}
    models = {"unet": ({"a.weight": torch.ones(4, 4)}, {}), "vae": ({"b.weight": torch.ones(5)}, quantised)}
    lines = run("inspect", write_pipeline(tmp_path / "base", models)).stdout.splitlines()
    assert lines[1:4] == ["pipeline    unet (16), vae (5)", "quantised   vae: x", "parameters  21 in 2 tensors"]


def test_the_format_may_be_named(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter")
    named = run("inspect", adapter, "--from", "peft", "--json")
    assert named.returncode == 0 and json.loads(named.stdout)["format"] == "peft"
    other = run("inspect", adapter, "--from", "kohya")
    assert other.returncode == 1 and other.stderr.startswith("Error: ")
    none = run("inspect", adapter, "--from", "petf")
    assert none.returncode == 2 and none.stderr.startswith("Error: unknown --from: found petf, expected peft or ")


def test_a_picture_is_drawn_and_one_of_another_kind_refused_before_work(tmp_path: Path, base: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter")
    found = run("inspect", adapter, "--base", base, "--plot", tmp_path / "x.svg")
    assert found.returncode == 0 and "‖ΔW‖ " in found.stdout  # --spectra is implied
    assert (tmp_path / "x.svg").read_bytes().startswith(b"<?xml")
    other = run("inspect", adapter, "--plot", tmp_path / "x.bmp")
    assert (other.returncode, other.stderr) == (2, "Error: --plot: found x.bmp, expected a name that ends in .png or .svg or .pdf\n")
    inside = run("inspect", adapter, "--plot", adapter / "x.png")
    assert inside.returncode == 1 and "is, holds or lies inside the input" in inside.stderr


def test_matplotlib_is_imported_for_a_picture_alone(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter")
    asked = "print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    code = f"import sys; from loratools.cli import run; run(['inspect', {str(adapter)!r}]); {asked}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT, check=True)
    assert found.stdout.splitlines()[-1] == "False False"
