"""diffusers, live: what check says it refuses it refuses, what it ignores it leaves out, and what is clean it loads, module by module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.formats import save
from tests.files import write_pipeline
from tests.interop.test_diffusers import adapter_of, unet

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def keys(change: Callable[[str], str]) -> Change:
    return lambda tensors: {change(key): tensor for key, tensor in tensors.items()}


PAIRS = {"lora_up.weight": ("hada_w1_a", "hada_w2_a"), "lora_down.weight": ("hada_w1_b", "hada_w2_b")}


def loha(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two pairs of factors for one, under kohya's names."""
    made = {}
    for key, tensor in tensors.items():
        module, _, slot = key.partition(".")
        made |= {f"{module}.{word}": tensor.flatten(1).clone() for word in PAIRS.get(slot, ())} or {key: tensor}
    return made


def with_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {key.replace(".lora_A.weight", ".alpha"): torch.tensor(1.0) for key in tensors if ".lora_A." in key}


# a file of each kind, by its format and what is done to it, the rule that tells it, and what diffusers does
CASES: dict[str, tuple[str, Change, str | None]] = {
    "diffusers": ("diffusers", dict, None),
    "kohya": ("kohya", dict, None),
    "without its part": ("diffusers", keys(lambda key: key.removeprefix("unet.")), "parts"),
    "alphas beside": ("diffusers", with_alphas, "alpha"),
    "lycoris": ("kohya", keys(lambda key: key.replace("lora_unet_", "lycoris_")), "prefix"),
    "LoHa": ("kohya", loha, "kind"),
}  # fmt: skip


def loaded(file: Path) -> int:
    """How many modules of a UNet get LoRA from a file. Raises what the pipeline raises."""

    class Pipeline(diffusers.loaders.StableDiffusionLoraLoaderMixin):  # type: ignore[misc]
        def __init__(self) -> None:
            self.unet, self.text_encoder, self.hf_device_map = unet(), None, None
            self.components = {"unet": self.unet}

        @property
        def lora_scale(self) -> float:
            return 1.0

    pipeline: Any = Pipeline()
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True)
    return sum("lora_A" in name for name, _ in pipeline.unet.named_parameters())


@pytest.mark.parametrize("word", CASES)
def test_check_says_what_diffusers_does(word: str, tmp_path: Path) -> None:
    format, change, rule = CASES[word]
    adapter = adapter_of(unet(), False)
    save(adapter, tmp_path / "a.safetensors", format=format)
    made = change(load_file(tmp_path / "a.safetensors"))
    save_file({key: tensor.contiguous() for key, tensor in made.items()}, tmp_path / "b.safetensors", {"format": "pt"})
    found = loratools.check(tmp_path / "b.safetensors", "diffusers")
    assert {row["rule"] for row in found["findings"]} == ({rule} if rule else set())
    if rule is None:
        assert loaded(tmp_path / "b.safetensors") == len(adapter)
    elif found["findings"][0]["kind"] == "ignore":
        assert loaded(tmp_path / "b.safetensors") == 0
    else:
        with pytest.raises(ValueError, match=r"Invalid LoRA checkpoint|not been correctly renamed"):
            loaded(tmp_path / "b.safetensors")


@pytest.mark.parametrize("word", ["without its part", "alphas beside", "lycoris", "LoHa"])
def test_what_is_fitted_is_loaded_whole(word: str, tmp_path: Path) -> None:
    format, change, _ = CASES[word]
    plain = unet()
    adapter = adapter_of(plain, False)
    save(adapter, tmp_path / "a.safetensors", format=format)
    made = change(load_file(tmp_path / "a.safetensors"))
    save_file({key: tensor.contiguous() for key, tensor in made.items()}, tmp_path / "b.safetensors", {"format": "pt"})
    base = write_pipeline(tmp_path / "base", {"unet": (plain.state_dict(), {"_class_name": "UNet2DConditionModel"})})
    loratools.fit(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "diffusers", base=base)
    assert loaded(tmp_path / "c.safetensors") == len(adapter)
