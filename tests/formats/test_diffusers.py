"""diffusers' files: four spellings, scales from the metadata, from alphas or 1, parts of a pipeline; every fault named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError, LoratoolsError, MatchError
from loratools.formats import load
from loratools.formats.diffusers import decode
from loratools.tensors import read_tensor
from tests.formats.keytables import container
from tests.strategies import randn

UP, DOWN = randn(4, 2, seed=0), randn(2, 6, seed=1)
SPELLINGS = {
    "peft": ("unet.mid_block.attn1.to_q.lora_{}.weight", "A", "B", "unet.mid_block.attn1.to_q.weight"),
    "down": ("unet.mid_block.attn1.to_q.lora.{}.weight", "down", "up", "unet.mid_block.attn1.to_q.weight"),
    "processor": ("unet.mid_block.attn1.processor.to_q_lora.{}.weight", "down", "up", "unet.mid_block.attn1.to_q.weight"),
    "processor, out": ("mid_block.attn1.processor.to_out_lora.{}.weight", "down", "up", "mid_block.attn1.to_out.0.weight"),
    "linear layer": ("text_encoder.fc1.lora_linear_layer.{}.weight", "down", "up", "text_encoder.fc1.weight"),
    "kohya's suffix": ("text_encoder_2.fc1.lora_{}.weight", "down", "up", "text_encoder_2.fc1.weight"),
    "alone": ("transformer_blocks.0.attn.to_q.lora_{}.weight", "A", "B", "transformer_blocks.0.attn.to_q.weight"),
}


def read(folder: Path, tensors: dict[str, Tensor], stated: dict[str, Any] | None = None) -> Any:
    metadata = None if stated is None else {"lora_adapter_metadata": json.dumps(stated)}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "x.safetensors", metadata=metadata)
    return load(folder / "x.safetensors")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(tmp_path: Path, spelling: str) -> None:
    pattern, down, up, name = SPELLINGS[spelling]
    adapter = read(tmp_path, {pattern.format(down): DOWN, pattern.format(up): UP})
    assert list(adapter) == [name] and adapter.format == "diffusers"
    found = adapter[name]
    assert isinstance(found, LowRank) and found.scaling == 1.0 and torch.equal(read_tensor(found.B), UP)
    assert adapter.notes == ("1 modules have no alpha: their scale is 1, as diffusers reads it",)


PAIR = {"unet.mid.to_q.lora_A.weight": DOWN, "unet.mid.to_q.lora_B.weight": UP}
STATED = {"unet.r": 2, "unet.lora_alpha": 8, "unet.use_dora": False}


@pytest.mark.parametrize(
    ("stated", "scaling"),
    [
        (STATED, 4.0), (STATED | {"unet.alpha_pattern": {"^mid.to_q": 3}}, 1.5), (STATED | {"unet.use_rslora": True}, 8 / math.sqrt(2)),
        (STATED | {"unet.r": 4, "unet.rank_pattern": {"to_q": 2}}, 4.0),
    ],
)  # fmt: skip
def test_scales_of_the_metadata(tmp_path: Path, stated: dict[str, Any], scaling: float) -> None:
    adapter = read(tmp_path, PAIR, stated)
    assert adapter["unet.mid.to_q.weight"].scaling == pytest.approx(scaling, rel=1e-15) and adapter.notes == ()


def test_settings_that_change_no_tensors_meaning(tmp_path: Path) -> None:
    """All that peft 0.21's LoraConfig says of a plain LoRA, as diffusers copies it."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights="gaussian").to_dict()
    stated = {f"unet.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    assert read(tmp_path, PAIR, stated)["unet.mid.to_q.weight"].scaling == 3.0


def test_lokr_under_dotted_names(tmp_path: Path) -> None:
    """As ai-toolkit writes it: two whole factors, whose alpha is nothing to go by."""
    factors = {"transformer.x.lokr_w1": randn(2, 3, seed=0), "transformer.x.lokr_w2": randn(4, 2, seed=1)}
    adapter = read(tmp_path, factors | {"transformer.x.alpha": torch.tensor(9999999999.0)})
    assert adapter.format == "diffusers" and adapter["transformer.x.weight"].facts()["scaling"] == 1.0


def test_a_lone_models_metadata_has_no_part(tmp_path: Path) -> None:
    tensors = {key.removeprefix("unet."): tensor for key, tensor in PAIR.items()}
    assert read(tmp_path, tensors, {"r": 2, "lora_alpha": 6})["mid.to_q.weight"].scaling == 3.0


def test_alphas_biases_and_magnitudes(tmp_path: Path) -> None:
    more = {"unet.mid.to_q.alpha": torch.tensor(3.0), "unet.mid.to_q.lora_B.bias": randn(4, seed=3)}
    adapter = read(tmp_path, PAIR | more)
    bias = adapter["unet.mid.to_q.bias"]
    assert adapter["unet.mid.to_q.weight"].scaling == 1.5 and isinstance(bias, Full) and bias.scale == 1.5
    found = read(tmp_path, PAIR | {"unet.mid.to_q.lora_magnitude_vector": torch.ones(4)})["unet.mid.to_q.weight"]
    assert isinstance(found, DoRA) and found.axis == "out" and found.magnitude.spec.shape == (4, 1)


def test_a_published_file() -> None:
    adapter = decode(container("flux_lora_diffusers_format"))
    assert len(adapter) == 494 and all(name.startswith("transformer.") and name.endswith(".weight") for name in adapter)


MAGNITUDE = {"unet.mid.to_q.lora_magnitude_vector": torch.ones(4)}
FAULTS: dict[str, tuple[dict[str, Tensor], dict[str, Any] | None, type[LoratoolsError], str]] = {
    "no partner": ({"unet.mid.to_q.lora_A.weight": DOWN}, None, FormatError, "has no lora_B.weight beside it"),
    "a stray": (PAIR | {"unet.norm.weight": UP}, None, FormatError, "unet.norm.weight: neither a LoRA tensor"),
    "twice": (PAIR | {"unet.mid.to_q.lora.up.weight": UP}, None, FormatError, "the same tensor twice under two spellings"),
    "two scales": (PAIR | {"unet.mid.to_q.alpha": torch.tensor(1.0)}, STATED, FormatError, "to_q.alpha: an alpha beside the metadata"),
    "no alpha of the part": (PAIR, {"text_encoder.lora_alpha": 3}, FormatError, "tells no alpha of this module"),
    "an alpha that no float holds": (PAIR, STATED | {"unet.lora_alpha": 10**400}, FormatError, "tells no alpha of this module: found 1000"),
    "another rank": (PAIR, STATED | {"unet.r": 3}, MatchError, "the rank is not the metadata's: found 2, expected 3"),
    "a magnitude not stated": (PAIR | MAGNITUDE, STATED, FormatError, "use_dora of the metadata and the tensors disagree"),
    "an initialisation": (PAIR, STATED | {"unet.init_lora_weights": "PiSSA"}, LoratoolsError, "init_lora_weights may have changed"),
    "a variant": (PAIR, STATED | {"unet.use_qalora": True}, LoratoolsError, "use_qalora: a setting that may change what the tensors mean"),
    "aLoRA": (PAIR, STATED | {"unet.alora_invocation_tokens": [1]}, LoratoolsError, "acts only after its invocation tokens"),
    "patterns that are none": (PAIR, STATED | {"unet.alpha_pattern": [1]}, FormatError, "unet.alpha_pattern: found [1]"),
    "no regular expression": (PAIR, STATED | {"unet.rank_pattern": {"(": 2}}, FormatError, "unet.rank_pattern: found {'(': 2}"),
    "one stated and not there": (PAIR, STATED | {"unet.use_dora": True}, FormatError, "use_dora of the metadata and the tensors disagree"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_tensor(tmp_path: Path, name: str) -> None:
    tensors, stated, error, text = FAULTS[name]
    with pytest.raises(error) as caught:
        read(tmp_path, tensors, stated)
    assert text in str(caught.value) and "x.safetensors" in str(caught.value)


def test_metadata_that_is_no_object(tmp_path: Path) -> None:
    save_file(PAIR, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": "[1"})
    with pytest.raises(FormatError, match="lora_adapter_metadata is not an object"):
        load(tmp_path / "x.safetensors")
