"""An alpha that the header tells in a trainer's own words: an error where it would give another scale than the format's readers take."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from loratools.errors import AmbiguousError
from loratools.formats import load
from loratools.formats.base import ReadOptions
from tests.strategies import randn

MODULES = {"diffusers": "unet.mid_block.to_q", "comfyui": "diffusion_model.x.q"}


def written(folder: Path, module: str, metadata: dict[str, str], *, alpha: float | None = None) -> Path:
    tensors = {f"{module}.lora_A.weight": randn(2, 6, seed=0), f"{module}.lora_B.weight": randn(4, 2, seed=1)}
    more = {} if alpha is None else {f"{module}.alpha": randn(1, seed=2).fill_(alpha)}
    save_file(tensors | more, folder / "x.safetensors", metadata=metadata)
    return folder / "x.safetensors"


@pytest.mark.parametrize("format", MODULES)
@pytest.mark.parametrize(
    "metadata", [{"alpha": "32"}, {"lora_alpha": "1.5", "rank": "2"}, {"network_alpha": "[4]"}, {"alpha": "2", "lora_alpha": "4"}]
)
def test_another_scale_is_an_error_that_names_the_option(tmp_path: Path, format: str, metadata: dict[str, str]) -> None:
    path = written(tmp_path, MODULES[format], metadata)
    with pytest.raises(AmbiguousError, match=r"pass over: they scale by 1: found .*alpha .*, expected the rank, 2, .*--alpha-in") as caught:
        load(path)
    assert str(path) in str(caught.value)
    adapter = load(path, options=ReadOptions(alpha=32.0))
    assert [delta.facts()["scaling"] for delta in adapter.values()] == [16.0]


@pytest.mark.parametrize("format", MODULES)
@pytest.mark.parametrize("metadata", [{}, {"alpha": "2"}, {"lora_alpha": "2.0", "rank": "2"}, {"ss_network_alpha": "7"}])
def test_the_same_scale_or_a_hint_of_kohyas_is_none(tmp_path: Path, format: str, metadata: dict[str, str]) -> None:
    assert [delta.facts()["scaling"] for delta in load(written(tmp_path, MODULES[format], metadata)).values()] == [1.0]


@pytest.mark.parametrize("format", MODULES)
def test_an_alpha_beside_the_module_is_the_one(tmp_path: Path, format: str) -> None:
    path = written(tmp_path, MODULES[format], {"alpha": "32"}, alpha=3.0)
    assert [delta.facts()["scaling"] for delta in load(path).values()] == [1.5]
