"""Adapters that people trained and published: read, written again with equal bytes, merged by their own formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools import merge
from loratools.deltas.lowrank import LowRank
from loratools.formats import load, save
from tests.files import raw, read_adapter, read_checkpoint, write_checkpoint
from tests.strategies import randn

DATA = Path(__file__).parent.parent / "data"
# folder: deltas, parameters, alpha
REAL = {"peft_clip_text_encoder": (24, 294_912, 8.0), "peft_convnext": (36, 529_920, 16.0)}


@pytest.mark.parametrize("name", REAL)
def test_what_is_in_it(name: str) -> None:
    adapter, (count, parameters, alpha) = load(DATA / name), REAL[name]
    assert (len(adapter), adapter.parameters, adapter.notes) == (count, parameters, ())
    assert {(delta.rank, delta.alpha, delta.rslora) for delta in adapter.values() if isinstance(delta, LowRank)} == {(8, alpha, False)}
    assert sum(tensor.numel() for tensor in load_file(DATA / name / "adapter_model.safetensors").values()) == parameters


@pytest.mark.parametrize("name", REAL)
def test_written_again_it_has_the_same_tensors_and_meaning(tmp_path: Path, name: str) -> None:
    save(load(DATA / name), tmp_path / "again")
    (theirs, config), (ours, written) = read_adapter(DATA / name), read_adapter(tmp_path / "again")
    assert ours.keys() == theirs.keys() and all(raw(ours[key]) == raw(theirs[key]) for key in theirs)
    kept = ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "peft_type", "base_model_name_or_path", "auto_mapping", "lora_dropout")
    assert {key: written[key] for key in kept} == {key: config[key] for key in kept}
    # the tensors' bytes lie in the file as peft laid them, behind another header
    data = [(folder / "adapter_model.safetensors").read_bytes() for folder in (DATA / name, tmp_path / "again")]
    assert len({part[8 + int.from_bytes(part[:8], "little") :] for part in data}) == 1


@pytest.mark.parametrize("name", REAL)
def test_merged_it_is_its_formula(tmp_path: Path, name: str) -> None:
    tensors, alpha = load_file(DATA / name / "adapter_model.safetensors"), REAL[name][2]
    modules = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    pairs = {
        module: (tensors[f"base_model.model.{module}.lora_A.weight"], tensors[f"base_model.model.{module}.lora_B.weight"])
        for module in modules
    }
    base = {f"{module}.weight": randn(B.shape[0], A.shape[1], seed=i) for i, (module, (A, B)) in enumerate(pairs.items())}
    write_checkpoint(tmp_path / "base", base)
    receipt = merge(tmp_path / "base", DATA / name, tmp_path / "out")
    assert receipt["applied"] == receipt["expected"] == len(modules)
    merged = read_checkpoint(tmp_path / "out")
    for module, (A, B) in pairs.items():
        exact = base[f"{module}.weight"].double() + alpha / 8 * B.double() @ A.double()
        assert torch.equal(merged[f"{module}.weight"], exact.float())  # correctly rounded, here without one exception
