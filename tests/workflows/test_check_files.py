"""Published adapters beside every target: what becomes of them, and that what fit makes of them is clean or told in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import loratools
from loratools.errors import LoratoolsError
from loratools.formats import FORMATS
from loratools.formats.base import read_options
from loratools.workflows._checking import strikes, subject_in
from loratools.workflows.targets import target_of
from tests.formats.keytables import TABLES, container

DATA = Path(__file__).parents[1] / "data"
TARGETS = ("comfyui", "diffusers", "kohya", "llama.cpp", "mlx", "peft", "sglang", "vllm")
FILES = {
    "peft_clip_text_encoder": {}, "peft_convnext": {}, "mlx": {}, "cloneofsimo/lora_disney_inpainting.safetensors": {},
    "sam_lora/lora_rank2.safetensors": {}, "loralib/roberta_base_lora_mnli.bin": {"alpha_in": 16.0},
}  # fmt: skip
# those that a target runs, and what it then loses: `format` is what writing mends
RUNS = {
    "peft_clip_text_encoder": {"comfyui", "diffusers", "kohya", "peft"}, "peft_convnext": {"peft"},
    "mlx": {"llama.cpp", "mlx", "peft", "sglang", "vllm"}, "cloneofsimo/lora_disney_inpainting.safetensors": {*TARGETS[:3], "peft"},
    "sam_lora/lora_rank2.safetensors": {"peft"}, "loralib/roberta_base_lora_mnli.bin": {"llama.cpp", "mlx", "peft", "sglang", "vllm"},
}  # fmt: skip
CLEAN = {("peft_clip_text_encoder", "peft"), ("peft_convnext", "peft"), ("mlx", "mlx")}


@pytest.mark.parametrize("file", FILES)
def test_a_published_adapter_is_clean_where_it_is_at_home_and_of_another_model_elsewhere(file: str) -> None:
    for name in TARGETS:
        found = loratools.check(DATA / file, name, **FILES[file])  # type: ignore[arg-type]
        assert found["clean"] == ((file, name) in CLEAN), (name, found["findings"][:2])
        assert any(row["rule"] == "network" for row in found["findings"]) == (name not in RUNS[file]), name
        assert all(row["share"] is None or 0 <= row["share"] <= 1 for row in found["findings"])


@pytest.mark.parametrize("file", ["peft_clip_text_encoder", "mlx", "cloneofsimo/lora_disney_inpainting.safetensors"])
def test_what_is_fitted_is_clean_or_told(file: str, tmp_path: Path) -> None:
    for name in TARGETS:
        out = tmp_path / (f"{name}.gguf" if name == "llama.cpp" else f"{name}.safetensors" if name in TARGETS[:3] else name)
        try:
            loratools.fit(DATA / file, out, name)
        except LoratoolsError as error:
            told = "modules of" if name not in RUNS[file] else "--base"
            assert told in str(error) and not out.exists()
            assert "\n" not in str(error) or name in RUNS[file]
            continue
        assert name in RUNS[file] and loratools.check(out, name)["clean"]


# of published files' keys, by rule: what ComfyUI, diffusers and sd-scripts lose of them
TABLE = {
    "anima_lora_kohya_format": ("", "", ""),
    "flux_dora_onetrainer_format": ("", "axis dora_scale", "dora prefix"),
    "flux_lokr_bfl_format": ("", "kind original", "format kind"),
    "flux_lora_aitoolkit_format": ("", "original", "format"),
    "flux_lora_diffusers_format": ("", "", "format"),
    "flux_lora_kohya_format": ("", "", ""),
    "krea2_lora_kohya_format": ("", "", ""),
    "qwen_image_lora_kohya_format": ("", "kind", "kind"),
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_keys_of_published_files(table: str) -> None:
    file = container(table)
    row = next(row for row in FORMATS if row.detect(file))
    adapter = replace(row.decode(file, read_options({})), format=row.name)
    found = {name: {one.rule.id for one in strikes(subject_in(file, adapter, target_of(name)), target_of(name))} for name in TARGETS}
    assert tuple(" ".join(sorted(found[name])) for name in TARGETS[:3]) == TABLE[table]
    assert all("network" in found[name] for name in ("llama.cpp", "mlx", "sglang", "vllm"))
