"""Megatron-Bridge: adapters that its modules trained are what loratools merges, and what loratools writes is what they load.

The logits of a model with its layers lie beside the adapters in tests/data/trained/nemo; where it is installed its modules run anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import convert
from loratools.formats import load
from tests.files import read_checkpoint
from tests.interop.trained import assert_same, cases, hugging_face, logits_of, make_base, merged_logits, peft_adapter, recorded

LIVE = "install Megatron-Bridge, which needs no GPU for its adapters: pip install --no-deps megatron-bridge==0.3.1 megatron-core==0.16.1"
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def live() -> Any:
    """Megatron-Bridge's own modules."""
    pytest.importorskip("megatron.core", reason=LIVE)
    if not Path(__import__("megatron.core").core.__file__).parent.parent.joinpath("bridge", "peft").is_dir():
        pytest.skip(LIVE)
    from tests.interop.trainers import with_nemo

    return with_nemo


@pytest.mark.parametrize("case", cases("nemo"))
def test_what_it_trained(tmp_path: Path, case: str) -> None:
    base, adapter, logits = recorded("nemo", case)
    assert load(adapter).format == "nemo"
    assert_same(merged_logits(base, adapter, tmp_path / "out"), logits, logits_of(hugging_face(base)))


@pytest.mark.parametrize("case", cases("nemo"))
def test_what_it_trains(tmp_path: Path, case: str) -> None:
    """Trained now, and as its modules load what was saved."""
    nemo = live()
    base, adapter = recorded("nemo", case)[0], tmp_path / "adapter"
    trained = nemo.train(case, base, adapter)
    assert torch.equal(nemo.logits(base, adapter), trained)
    assert_same(merged_logits(base, adapter, tmp_path / "out"), trained, logits_of(hugging_face(base)))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("targets", [DENSE, ["q_proj", "v_proj", "up_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_it_loads_what_peft_saved(tmp_path: Path, kind: str, targets: list[str], more: dict[str, Any]) -> None:
    nemo = live()
    make_base(kind, tmp_path / "base")
    logits = peft_adapter(tmp_path / "base", tmp_path / "peft", targets=targets, **more)
    convert(tmp_path / "peft", tmp_path / "nemo", format="nemo", base=tmp_path / "base")
    assert_same(nemo.logits(tmp_path / "base", tmp_path / "nemo"), logits, logits_of(hugging_face(tmp_path / "base")))


def test_canonical_there_and_back(tmp_path: Path) -> None:
    _, adapter, _ = recorded("nemo", "llama-canonical")
    convert(adapter, tmp_path / "nemo", format="nemo")
    tensors, before = read_checkpoint(tmp_path / "nemo"), read_checkpoint(adapter)
    assert tensors.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
