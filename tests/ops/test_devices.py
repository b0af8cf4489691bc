"""The operations on every device there is: the same bytes as on the CPU where arithmetic is exact, the layers' opinion on the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loratools
from tests.files import write_adapter, write_checkpoint

ROWS, COLUMNS = 300, 200


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


def _files(folder: Path, dtype: torch.dtype, dora: bool) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)
    W = (torch.randn(ROWS, COLUMNS, generator=generator) * 0.05).to(dtype)
    root = "base_model.model.q"
    tensors = {
        f"{root}.lora_A.weight": torch.randn(8, COLUMNS, generator=generator) * 0.1,
        f"{root}.lora_B.weight": torch.randn(ROWS, 8, generator=generator) * 0.05,
    }
    if dora:
        tensors[f"{root}.lora_magnitude_vector"] = W.float().norm(dim=1) * 1.01
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"], "use_dora": dora}
    base = write_checkpoint(folder / "base", {"q.weight": W, "other.weight": W.clone()})
    return base, write_adapter(folder / "adapter", tensors, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_merge_gives_the_bytes_of_the_cpu_and_the_layers_agree(device: str, dtype: torch.dtype, dora: bool, tmp_path: Path) -> None:
    base, adapter = _files(tmp_path, dtype, dora)
    here = loratools.merge(base, adapter, tmp_path / "here")
    there = loratools.merge(base, adapter, tmp_path / "there", device=device)
    assert here["digests"] == there["digests"]
    report = loratools.verify(tmp_path / "there", base=base, adapters=adapter, forward=True, device=device)
    assert report["ok"] and report["max_ulp"] == 0 and report["forward"][0]["ratio"] is not None


def test_extract_finds_the_adapter_again(device: str, tmp_path: Path) -> None:
    base, adapter = _files(tmp_path, torch.float32, dora=False)
    loratools.merge(base, adapter, tmp_path / "tuned")
    receipt = loratools.extract(base, tmp_path / "tuned", tmp_path / "again", rank=8, device=device)
    # the merged weights were rounded to float32, 2**-24 of weights 20 times the size of a change of 5 %: 1e-6 of the change
    assert receipt["tensors"][0]["error"] < 1e-5
