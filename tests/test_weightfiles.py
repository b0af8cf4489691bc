"""weightfiles: which file of a folder is the model, in transformers' order; what several are, and what none is."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.errors import AmbiguousError, FormatError, UnsupportedError
from loratools.weightfiles import as_safetensors, is_index, model_file

STATE = ["adapter_model.safetensors", "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state_0.pth", "scaler.pt"]


def folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).write_bytes(b"")
    return path


@pytest.mark.parametrize(
    "names",
    [  # the first is opened
        ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.fp16.safetensors", "other.safetensors"],
        ["model.safetensors.index.json", "model-00001-of-00001.safetensors", "pytorch_model.bin", "consolidated.safetensors"],
        ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.non_ema.safetensors"],
        ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.fp16.safetensors", "consolidated.00.pth"],
        ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "other.safetensors"],
        ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"],
        ["other.safetensors.index.json", "other-1.safetensors", "consolidated.safetensors"],
        ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
        ["model.fp16.safetensors"],
        ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin"],
        ["finetune.safetensors", "finetune.ckpt"],
        ["pytorch_model.bin.index.fp16.json", "pytorch_model.fp16-00001-of-00001.bin"],
        ["pytorch_model.fp16.bin"],
        ["consolidated.00.pth"],
        ["v1-5.ckpt", "model.onnx", "tf_model.h5"],
        ["model.pt"],
    ],
    ids=lambda names: names[0],
)
def test_the_first_kind_there_is_any_of(tmp_path: Path, names: list[str]) -> None:
    assert model_file(folder(tmp_path, *names, *STATE, "config.json", "unmerge.safetensors", "x.unmerge.safetensors")) == names[0]


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors", "diffusion_pytorch_model.safetensors"],
        ["model.bf16.safetensors", "model.fp16.safetensors"],
        ["model.safetensors.index.fp16.json", "model.bf16.safetensors"],
        ["model.fp16.safetensors", "other.safetensors"],
        ["a.safetensors.index.json", "b.safetensors.index.json"],
        ["a.bin", "b.pth", "c.pt"],
    ],
)
def test_several_of_one_kind_are_told(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(AmbiguousError, match=f"holds several models: found {', '.join(names)}; name one of them as the path"):
        model_file(folder(tmp_path, *names, "c.pt"))


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no weights in it: expected model\.safetensors"):
        model_file(tmp_path)
    with pytest.raises(UnsupportedError, match=r"no model of safetensors or torch in it: found optimizer\.pt, tf_model\.h5"):
        model_file(folder(tmp_path, "tf_model.h5", "optimizer.pt"))
    with pytest.raises(FormatError, match="no such file or folder"):
        model_file(tmp_path / "gone")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
        ("pytorch_model.bin.index.json", "model.safetensors.index.json"),
        ("pytorch_model.bin.index.fp16.json", "model.safetensors.index.fp16.json"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("consolidated.00.pth", "consolidated.00.safetensors"),
        ("v1-5.bin.ckpt", "v1-5.bin.safetensors"),
        ("model.fp16.safetensors", "model.fp16.safetensors"),
        ("model.safetensors.index.fp16.json", "model.safetensors.index.fp16.json"),
    ],
)
def test_the_name_as_safetensors(name: str, expected: str) -> None:
    assert as_safetensors(name) == expected
    assert is_index(name) == name.endswith(".json")
