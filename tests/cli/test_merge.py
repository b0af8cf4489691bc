"""loratools merge as a user sees it: the summary is the receipt's, --json is the receipt, faults leave nothing."""

from __future__ import annotations

import json
import math
import os
import pty
import subprocess
from pathlib import Path
from statistics import median

import pytest
import torch

import loratools
from loratools.cli._summary import merged
from tests.cli._adapters import command, environment, llama_adapter
from tests.cli._adapters import loratools as run
from tests.conftest import llama_config, llama_tensors
from tests.files import fp8_blocks, read_checkpoint, write_checkpoint


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """The tiny Llama in bfloat16, two shards, with other weights beside them."""
    folder = write_checkpoint(tmp_path / "base", llama_tensors(torch.bfloat16), llama_config(), shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"old")
    return folder


def test_the_summary_is_the_receipts(tmp_path: Path, half: Path) -> None:
    found = run("merge", half, llama_adapter(tmp_path / "adapter"), "-o", tmp_path / "out")
    assert (found.returncode, found.stderr) == (0, "")
    receipt = json.loads((tmp_path / "out" / "loratools.json").read_text())
    facts = {line.split("  ")[0].strip(): line.split("  ", 1)[1].strip() for line in found.stdout.splitlines()}
    norms = sorted(row["relative_norm"] for row in receipt["tensors"])
    assert facts["applied"] == "4 of 4 deltas"
    assert facts["changed"] == "4 of 17 tensors; the others are the base's bytes"
    assert facts["‖ΔW‖/‖W‖"].startswith(f"min {norms[0]:.4g}, median {median(norms):.4g}, max {norms[-1]:.4g} (model.layers.")
    least = min(receipt["tensors"], key=lambda row: row["survived"])
    assert f"min {100 * least['survived']:.2f} % ({least['name'].removesuffix('.weight')})" in facts["survived"]
    assert facts["left out"].startswith("pytorch_model.bin: other weights")
    assert facts["receipt"] == str(tmp_path / "out" / "loratools.json")


def test_json_is_the_receipt_and_nothing_else(tmp_path: Path, half: Path) -> None:
    found = run("merge", half, llama_adapter(tmp_path / "adapter"), "-o", tmp_path / "out", "--json")
    assert json.loads(found.stdout) == json.loads((tmp_path / "out" / "loratools.json").read_text())


def test_a_base_that_is_one_file_has_its_receipt_beside_it(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out.safetensors"
    text = run("merge", base / "model.safetensors", llama_adapter(tmp_path / "adapter"), "-o", out).stdout
    assert f"receipt   {out}.loratools.json" in text
    assert Path(f"{out}.loratools.json").is_file()


def test_options_reach_the_function(tmp_path: Path, base: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter", lora_alpha=None)
    arguments = ("merge", base, f"{adapter}:0.5", "--alpha-in", 4, "--dtype", "bf16", "--full-report", "--sha256", "--threads", 1)
    assert run(*arguments, "-o", tmp_path / "told").returncode == 0
    loratools.merge(base, f"{adapter}:0.5", tmp_path / "called", alpha_in=4, dtype="bf16", full_report=True, sha256=True, threads=1)
    told, called = read_checkpoint(tmp_path / "told"), read_checkpoint(tmp_path / "called")
    assert all(torch.equal(told[name], called[name]) and told[name].dtype == torch.bfloat16 for name in called)
    receipts = [json.loads((tmp_path / name / "loratools.json").read_text()) for name in ("told", "called")]
    assert receipts[0]["digests"] == receipts[1]["digests"] and "sha256" in receipts[0]["outputs"][0]
    assert "the others are cast to bf16" in "\n".join(merged(receipts[0], str(tmp_path / "told"), None))


def test_notes_go_to_stderr_and_quiet_silences_them(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {f"wrapped.{name}": tensor for name, tensor in llama_tensors().items()})
    adapter = llama_adapter(tmp_path / "adapter")
    loud = run("merge", base, adapter, "-o", tmp_path / "loud")
    assert loud.stderr == "Note: names aligned for the whole adapter: prefix 'wrapped.' added\n" and "Note" not in loud.stdout
    quiet = run("merge", base, adapter, "-o", tmp_path / "quiet", "--quiet")
    assert (quiet.returncode, quiet.stderr) == (0, "") and quiet.stdout.startswith("merged ")
    again = run("merge", base, adapter, "-o", tmp_path / "quiet", "--quiet")
    assert again.returncode == 1 and again.stderr.startswith("Error: ") and "--overwrite" in again.stderr
    assert run("merge", base, adapter, "-o", tmp_path / "quiet", "-q", "--overwrite").returncode == 0


@pytest.mark.parametrize("arguments", [(), ("--json",), ("--quiet",)])
def test_a_fault_leaves_nothing(tmp_path: Path, base: Path, arguments: tuple[str, ...]) -> None:
    adapter = llama_adapter(tmp_path / "adapter", hidden=16)
    found = run("merge", base, adapter, "-o", tmp_path / "rooms" / "out", *arguments)
    assert (found.returncode, found.stdout) == (1, "")
    lines = found.stderr.splitlines()
    assert len(lines) == 4 and all(line.startswith(f"Error: {adapter}") and "self_attn" in line for line in lines)
    assert not (tmp_path / "rooms").exists() or not list((tmp_path / "rooms").iterdir())


def test_a_weight_that_overflows_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(torch.float16), llama_config())
    found = run("merge", base, f"{llama_adapter(tmp_path / 'adapter')}:1e9", "-o", tmp_path / "rooms" / "out")
    assert found.returncode == 1 and "float16" in found.stderr and "self_attn" in found.stderr
    assert not list((tmp_path / "rooms").iterdir())


def test_progress_counts_every_byte_once(tmp_path: Path, half: Path) -> None:
    told: list[tuple[int, int]] = []
    adapter = llama_adapter(tmp_path / "adapter")
    loratools.merge(half, adapter, tmp_path / "out", progress=lambda done, total: told.append((done, total)), threads=3)
    expected = sum(tensor.numel() * tensor.element_size() for tensor in read_checkpoint(tmp_path / "out").values())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {expected} and told[-1] == (expected, expected)


def test_progress_is_no_part_of_the_receipt(tmp_path: Path, base: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter")
    assert "progress" not in loratools.merge(base, adapter, tmp_path / "out", progress=lambda done, total: None)["arguments"]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_bar_on_a_terminal_alone(tmp_path: Path, base: Path, quiet: bool) -> None:
    arguments = command("merge", base, llama_adapter(tmp_path / "adapter"), "-o", tmp_path / "out", *(["-q"] if quiet else []))
    near, far = pty.openpty()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=far, env=environment() | {"COLUMNS": "80", "TERM": "xterm"})
    os.close(far)
    seen = b""
    try:
        while chunk := os.read(near, 65536):
            seen += chunk
    except OSError:  # Linux says so when the last writer of a terminal has closed it
        pass
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and b"\x1b" not in out
    assert (b"Merging" in seen) is not quiet


def test_shares_that_are_not_there_are_left_out_of_the_summary(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(head=False), llama_config(tie_word_embeddings=True))
    receipt = loratools.merge(base, f"{llama_adapter(tmp_path / 'adapter')}:0", tmp_path / "out")
    lines = merged(receipt, str(tmp_path / "out"), 80)
    assert "applied  4 of 4 deltas" in lines and not any(line.startswith(("survived", "unmoved", "‖ΔW‖")) for line in lines)
    assert all(math.isfinite(len(line)) for line in lines)


def test_a_quantised_base_takes_an_option(tmp_path: Path, base: Path) -> None:
    tensors = llama_tensors(torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name], scale = fp8_blocks(tensors[name].float())
    write_checkpoint(base, tensors | {f"{name}_scale_inv": scale}, llama_config(quantization_config={"quant_method": "fp8"}))
    adapter = llama_adapter(tmp_path / "adapter")
    found = run("merge", base, adapter, "-o", tmp_path / "out")
    assert found.returncode == 1 and "quantised: found fp8; merge into the original" in found.stderr
    found = run("merge", base, adapter, "-o", tmp_path / "out", "--dequantize")
    assert found.returncode == 0 and "dequantised (fp8): 1 weight as BF16" in found.stderr
    assert "changed   4 of 17 tensors; the others are the dequantised copy's\n" in found.stdout
