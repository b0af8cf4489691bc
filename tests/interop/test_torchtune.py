"""torchtune: adapters that it trained and saved are what loratools merges, and what loratools writes is what it resumes from.

Its own logits lie beside the adapters in tests/data/trained/torchtune; where torchtune is installed it runs anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import convert, inspect
from loratools.formats import load
from tests.files import read_checkpoint
from tests.interop.trained import assert_same, cases, hugging_face, logits_of, make_base, merged_logits, peft_adapter, recorded

LIVE = "install torchtune 0.6.1 and the torchao of its time: pip install torchtune torchao==0.10.0"
BIASED = "qwen2-biased"  # torchtune's forward scales the biases of what has DoRA; its merge does not
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def live() -> Any:
    """torchtune run by its own functions."""
    pytest.importorskip("torchao.dtypes.nf4tensor", reason=LIVE)
    pytest.importorskip("torchtune", reason=LIVE)
    from tests.interop.trainers import with_torchtune

    return with_torchtune


def options(case: str) -> dict[str, Any]:
    return {"alpha_in": 12.0} if case.startswith("phi3") else {}  # of which torchtune writes no adapter_config.json


@pytest.mark.parametrize("case", [case for case in cases("torchtune") if case != BIASED])
def test_what_it_trained(tmp_path: Path, case: str) -> None:
    base, adapter, logits = recorded("torchtune", case)
    assert inspect(adapter, **options(case))["format"] == "torchtune"
    assert_same(merged_logits(base, adapter, tmp_path / "out", **options(case)), logits, logits_of(hugging_face(base)))


@pytest.mark.parametrize("case", [case for case in cases("torchtune") if case != BIASED])
def test_what_it_trains(tmp_path: Path, case: str) -> None:
    """Trained now, and as torchtune itself loads what it saved."""
    tune = live()
    base, adapter = recorded("torchtune", case)[0], tmp_path / "adapter"
    trained = tune.train(case, base, adapter)
    if not case.startswith("phi3"):
        assert torch.equal(tune.logits(base, adapter, tune.CASES[case][1]), trained)
    assert_same(merged_logits(base, adapter, tmp_path / "out", **options(case)), trained, logits_of(hugging_face(base)))


def test_dora_of_layers_with_a_bias(tmp_path: Path) -> None:
    """The weight is the one that torchtune itself merges; what its forward does to the bias is in neither."""
    base, adapter, logits = recorded("torchtune", BIASED)
    assert [note for note in load(adapter).notes if "torchtune's forward scaled their biases too, which its merge leaves" in note]
    notes = load(recorded("torchtune", "qwen2-dora")[1]).notes
    assert notes == ("read from adapter_model.pt, not from adapter_model.safetensors beside it: name that file to have it",)
    found = merged_logits(base, adapter, tmp_path / "out")
    assert (found - logits).abs().max() > 1e-3
    tune = live()
    theirs = tune.merged(base, adapter, tune.CASES[BIASED][1])
    ours = read_checkpoint(tmp_path / "out")
    for layer in range(2):
        for side in "qk":
            expected = theirs[f"layers.{layer}.attn.{side}_proj.weight"].double()
            torch.testing.assert_close(ours[f"model.layers.{layer}.self_attn.{side}_proj.weight"], expected, rtol=1e-5, atol=1e-6)


def test_what_it_writes_for_peft_is_another_change_of_qwen2(tmp_path: Path) -> None:
    """Why a folder of torchtune's is read as its own file: it permutes lora_B's rows of a model whose weights it never permuted."""
    base, adapter, logits = recorded("torchtune", "qwen2-lora")
    found = merged_logits(base, adapter / "adapter_model.safetensors", tmp_path / "out")
    assert (found - logits).abs().max() > 0.1
    base, adapter, logits = recorded("torchtune", "llama-lora")
    assert_same(merged_logits(base, adapter / "adapter_model.safetensors", tmp_path / "llama"), logits, logits_of(hugging_face(base)))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_it_resumes_from_what_peft_saved(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    tune = live()
    make_base(kind, tmp_path / "base")
    targets = DENSE[3:] if more == {"use_dora": True} and kind == "qwen2" else [*DENSE, "lm_head"]
    logits = peft_adapter(tmp_path / "base", tmp_path / "peft", targets=targets, **more)
    convert(tmp_path / "peft", tmp_path / "tune", format="torchtune", base=tmp_path / "base")
    told = {"modules": tune.ATTENTION if len(targets) > 4 else ["output_proj"], "mlp": True, "output": len(targets) > 4}
    found = tune.logits(tmp_path / "base", tmp_path / "tune", told | {"dora": "use_dora" in more})
    assert_same(found, logits, logits_of(hugging_face(tmp_path / "base")))
