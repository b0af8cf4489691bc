"""Each file is claimed by one format, whatever the order of the table: recorded keys, real files, and what each format writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.errors import UnsupportedError
from loratools.formats import FORMATS, load
from loratools.formats.base import Container, open_container
from tests.files import write_adapter
from tests.formats.keytables import TABLES, container
from tests.strategies import randn

DATA = Path(__file__).parent.parent / "data"
EXPECTED = {
    "anima_lora_kohya_format": "kohya", "flux_dora_onetrainer_format": "kohya", "flux_lokr_bfl_format": "comfyui",
    "flux_lora_aitoolkit_format": "comfyui", "flux_lora_diffusers_format": "diffusers", "flux_lora_kohya_format": "kohya",
    "krea2_lora_kohya_format": "kohya", "qwen_image_lora_kohya_format": "kohya",
}  # fmt: skip
REAL = {
    "cloneofsimo/lora_disney_inpainting.safetensors": "cloneofsimo", "mlx": "mlx", "sam_lora/lora_rank2.safetensors": "samlora",
    "peft_clip_text_encoder": "peft", "peft_convnext": "peft", "loralib/roberta_base_lora_mnli.bin": "loralib",
}  # fmt: skip


def claims(found: Container) -> list[str]:
    return [row.name for row in FORMATS if row.detect(found)]


@pytest.mark.parametrize("table", TABLES)
def test_recorded_keys(table: str) -> None:
    assert claims(container(table)) == [EXPECTED[table]]


@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str) -> None:
    assert claims(open_container(DATA / name)) == [REAL[name]]


def test_an_unknown_file_is_told_by_its_first_keys(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", {"blocks.0.mystery": randn(2, 2, seed=0)}, None)
    with pytest.raises(UnsupportedError, match=r"no format that loratools reads: found blocks\.0\.mystery"):
        load(folder / "adapter_model.safetensors")
