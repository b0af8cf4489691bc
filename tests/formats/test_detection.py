"""Each file is claimed by one format, whatever the order of the table: recorded keys, real files, and what each format writes."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loratools.formats as formats
from loratools.errors import FormatError, UnsupportedError
from loratools.formats import FORMATS, load
from loratools.formats._marks import LOOKS
from loratools.formats.base import Container
from loratools.formats.opening import open_container
from loratools.gguffile import write_gguf
from loratools.tensors import to_ref
from tests.files import write_adapter
from tests.formats.adapters import SMALL
from tests.formats.keytables import SPELT, TABLES, container, spelt
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


TRAINED = {"mlx": "mlx", "torchtune": "torchtune", "litgpt": "litgpt", "llama_cpp": "gguf", "nemo": "nemo"}


def claims(found: Container) -> list[str]:
    return [row.name for row in FORMATS if row.detect(found)]


@pytest.mark.parametrize("program", TRAINED)
def test_what_programs_saved(program: str) -> None:
    folders = [path for path in sorted((DATA / "trained" / program).iterdir()) if path.is_dir()]
    assert len(folders) >= 5
    for folder in folders:
        path = folder / "adapter.gguf" if program == "llama_cpp" else folder
        assert claims(open_container(path)) == [TRAINED[program]], folder


@pytest.mark.parametrize("table", TABLES)
def test_recorded_keys(table: str) -> None:
    assert claims(container(table)) == [EXPECTED[table]]


@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str) -> None:
    assert claims(open_container(DATA / name)) == [REAL[name]]


@pytest.mark.parametrize("name", SPELT)
def test_keys_by_rule(name: str) -> None:
    """Whichever of a file's keys come first, and all of them look like the format's."""
    found, format = spelt(name), name.partition(" ")[0]
    assert claims(found) == [format]
    assert [key for key in found.tensors if not re.fullmatch(LOOKS[format], key)] == []


def test_a_table_of_each_format() -> None:
    """Those that are not by rule are recorded or real; TensorRT-LLM's is no table, and loratools' keys are any."""
    told = {name.partition(" ")[0] for name in SPELT} | set(EXPECTED.values()) | set(REAL.values())
    assert told == {row.name for row in FORMATS} - {"trtllm", "loratools"}
    assert set(LOOKS) == {row.name for row in FORMATS} - {"loratools"}


def test_a_head_alone_is_litgpt_s_beside_its_hyperparameters() -> None:
    pair = {f"lm_head.lora_{side}": to_ref(torch.ones(2, 2)) for side in "AB"}
    assert claims(Container(pair)) == ["loralib"]
    assert claims(Container(pair, beside={"hyperparameters.yaml": {"lora_r": 2}})) == ["litgpt"]


@pytest.mark.parametrize("root", ["diffusion_model.", "text_encoders.clip_l.", ""])
def test_bare_factors_are_comfyuis_under_its_roots_and_loralibs_elsewhere(root: str) -> None:
    tensors = {f"{root}x.lora_{side}": to_ref(torch.ones(2, 2)) for side in "AB"}
    assert claims(Container(tensors)) == ["comfyui" if root else "loralib"]
    assert claims(Container(tensors, {"loratools.alpha": "2"})) == ["loralib"]  # which loratools wrote as such


@pytest.mark.parametrize("name", SMALL)
def test_small_files_of_each(tmp_path: Path, name: str) -> None:
    assert claims(open_container(SMALL[name]().write(tmp_path)[1])) == [name]


def test_a_gguf_file(tmp_path: Path) -> None:
    """Whatever it holds: what it is, a LoRA or another thing, is its decoder's to say."""
    for kind in ("adapter", "model"):
        write_gguf(tmp_path / "a.gguf", {"general.architecture": "llama", "general.type": kind}, {"x.lora_a": to_ref(randn(2, 2, seed=0))})
        assert claims(open_container(tmp_path / "a.gguf")) == ["gguf"]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_table_decides_nothing(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rows = list(FORMATS)
    random.Random(seed).shuffle(rows)
    monkeypatch.setattr(formats, "FORMATS", tuple(rows))
    found = {name: formats._format_of(container(name), None).name for name in TABLES}
    found |= {name: formats._format_of(open_container(DATA / name), None).name for name in REAL}
    assert found == EXPECTED | REAL


def test_most_keys_of_a_format_look_like_its_own() -> None:
    """What the nearest formats of an unknown file are told by; loratools' own has keys of any shape."""
    for name, make in SMALL.items():
        if name != "loratools":
            keys = list(make().tensors)
            assert sum(re.fullmatch(LOOKS[name], key) is not None for key in keys) == len(keys) or name == "diffusers", name


UNKNOWN = {
    "a half": ({"q.lora_A": (2, 4), "k.lora_A": (2, 4)}, "nearest loralib (2 of 2 keys); loralib needs lora_A and lora_B of a module"),
    "a prefix": (
        {"lora_foo_x.lora_down.weight": (2, 4), "other": (3,)}, "nearest kohya (1 of 2 keys); kohya needs a prefix such as lora_unet_",
    ),
    "two looks": (
        {"h.0.lora_b": (2, 4), "x.lora.A": (4, 2), "y.lora.A": (4, 2)},
        "nearest scratch (2 of 3 keys), mlx (1 of 3 keys); scratch needs lora.A and lora.B of a module; mlx needs MLX's",
    ),
    "half of torchtune's": (
        {"layers.0.mlp.w1.lora_b.weight": (2, 4)}, "nearest torchtune (1 of 1 keys); torchtune needs lora_a.weight of a module",
    ),
    "half of litgpt's": (
        {"transformer.h.0.mlp.proj.lora_B": (2, 4)},
        "litgpt (1 of 1 keys); loralib needs lora_A and lora_B of a module; litgpt needs lora_A of a module that litgpt's network has",
    ),
    "GGUF's names in another file": (
        {"blk.0.attn_q.weight.lora_a": (2, 4), "blk.0.attn_q.weight.lora_b": (4, 2)},
        "gguf (2 of 2 keys); mlx needs MLX's adapter_config.json beside it; gguf needs a .gguf file, whose fields tell the architecture",
    ),
    "TensorRT-LLM's arrays": (
        {"lora_config": (1, 3), "lora_weights": (1, 8)},
        "nearest trtllm (2 of 2 keys); trtllm needs the adapter that it was made of: it has neither names nor shapes",
    ),
    "none": ({"blocks.0.mystery": (2, 2)}, "is it a checkpoint, or an adapter of another program?"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_the_formats_that_an_unknown_file_comes_near_to(tmp_path: Path, case: str) -> None:
    shapes, said = UNKNOWN[case]
    folder = write_adapter(tmp_path / "a", {key: randn(*shape, seed=0) for key, shape in shapes.items()}, None)
    with pytest.raises((UnsupportedError, FormatError)) as caught:
        load(folder / "adapter_model.safetensors")
    assert said in str(caught.value)
    assert next(iter(sorted(shapes))) in str(caught.value)


@pytest.mark.parametrize("name", ["x.ti.pt", "learned_embeds.bin", "emb.safetensors"])
def test_a_textual_inversion_alone_is_told_what_it_is(tmp_path: Path, name: str) -> None:
    tensors = {"emb_params": randn(2, 4, seed=0)} if name.startswith("emb") else {"<s1>": randn(4, seed=0), "<s2>": randn(4, seed=1)}
    save_file(tensors, tmp_path / name) if name.endswith("safetensors") else torch.save(tensors, tmp_path / name)
    with pytest.raises(UnsupportedError) as caught:
        load(tmp_path / name)
    said = str(caught.value)
    assert "a textual inversion: embeddings of tokens, which change no weight of a model" in said and next(iter(tensors)) in said
    assert "\n" not in said and "load_textual_inversion" in said


def test_a_textual_inversion_of_another_program(tmp_path: Path) -> None:
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": randn(2, 4, seed=0)}, "name": "cat"}, tmp_path / "x.pt")
    with pytest.raises(UnsupportedError, match=r"a textual inversion: embeddings of tokens.*: found cat; load it") as caught:
        load(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_an_unknown_file_is_told_by_its_first_keys(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", {"blocks.0.mystery": randn(2, 2, seed=0)}, None)
    with pytest.raises(UnsupportedError, match=r"no format that loratools reads: found blocks\.0\.mystery"):
        load(folder / "adapter_model.safetensors")
