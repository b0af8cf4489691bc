"""pipeline: several models as one checkpoint, each left to itself; what nothing changes is copied byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from torch import Tensor

from loratools.checkpoint import Checkpoint
from loratools.errors import AmbiguousError, FormatError, LoratoolsError
from loratools.families import Families
from loratools.pipeline import Pipeline, open_checkpoint
from loratools.refs import Buffer, Spec
from loratools.rewrite import Change, Seen
from tests.files import llama_config, llama_tensors, raw, write_checkpoint, write_pickled, write_pipeline
from tests.strategies import randn

UNET: dict[str, Tensor] = {"conv_in.weight": randn(4, 3, 3, 3, seed=1), "mid.attn.to_q.weight": randn(8, 8, seed=2)}
VAE: dict[str, Tensor] = {"encoder.conv.weight": randn(4, 3, 3, 3, seed=3), "steps": torch.tensor(7)}
MODELS = {
    "unet": (UNET, {"_class_name": "UNet2DConditionModel"}),
    "vae": (VAE, {"_class_name": "AutoencoderKL"}),
    "text_encoder": (llama_tensors(torch.bfloat16, head=False), llama_config(tie_word_embeddings=True)),
}


def constant(spec: Spec) -> Change:
    def blocks(seen: Seen) -> Iterable[Buffer]:
        yield b"\1" * spec.nbytes

    return Change(spec, blocks)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_names_are_the_models_and_their_own(tmp_path: Path) -> None:
    pipeline = open_checkpoint(write_pipeline(tmp_path, MODELS))
    assert isinstance(pipeline, Pipeline) and not pipeline.single and pipeline.quantization is None and pipeline.notes == []
    assert {name: bytes(ref.read()) for name, ref in pipeline.items()} == {
        f"{model}.{name}": raw(tensor) for model, (tensors, _) in MODELS.items() for name, tensor in tensors.items()
    }
    weights = ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    assert list(pipeline.files) == weights
    assert pipeline.parts["text_encoder."].config["model_type"] == "llama" and pipeline.config == {}
    assert type(open_checkpoint(tmp_path / "unet")) is Checkpoint


def test_each_model_is_asked_of_its_own_tensors(tmp_path: Path) -> None:
    gpt = {"h.0.attn.c_proj.weight": randn(8, 8, seed=0), "wte.weight": randn(9, 8, seed=1)}
    models = MODELS | {"text_encoder_2": (gpt, {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": True})}
    pipeline = Pipeline(write_pipeline(tmp_path, models))
    family = pipeline.family(embeddings=("unet.conv_in",))
    assert isinstance(family, Families) and family.tells_transposed
    assert family.transposed("text_encoder_2.h.0.attn.c_proj.weight") and not family.transposed("unet.h.0.attn.c_proj.weight")
    assert family.embedding("text_encoder_2.wte.weight") and family.embedding("unet.conv_in.weight")
    assert not family.embedding("unet.mid.attn.to_q.weight")
    assert family.ties(pipeline) == [
        ("text_encoder.model.embed_tokens.weight", "text_encoder.lm_head.weight"),
        ("text_encoder_2.wte.weight", "text_encoder_2.lm_head.weight"),
    ]
    assert family.tied(pipeline) == family.ties(pipeline)[0] and not family.stacked("unet.mid.attn.to_q.weight", (8, 8))
    assert not Pipeline(write_pipeline(tmp_path / "other", MODELS)).family().tells_transposed


@pytest.mark.parametrize("workers", [1, 3])
def test_what_changes_is_rewritten_and_the_rest_copied(tmp_path: Path, workers: int) -> None:
    base = write_pipeline(tmp_path / "base", MODELS)
    for name in ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "sd-v1-5.ckpt", "extra/model.bin"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"stale")
    for name in ("vae/diffusion_pytorch_model.fp16.safetensors", "vae/flax_model.msgpack", "unet/notes/a.txt"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"kept")
    told: list[tuple[int, int]] = []
    changed = {"unet.conv_in.weight": constant(Spec("F16", (4, 3, 3, 3)))}
    pipeline = Pipeline(base)
    done = pipeline.rewrite(
        tmp_path / "out", changed, added={"text_encoder.lm_head.weight": constant(Spec("BF16", (17, 8)))},
        config={"text_encoder.tie_word_embeddings": False}, workers=workers, progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    before, after = files(base), files(tmp_path / "out")
    left = {"unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "sd-v1-5.ckpt", "extra/model.bin"}
    assert {row["name"] for row in done.left_out} == left and before.keys() - left == after.keys()
    written = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "text_encoder/config.json"}
    assert {name for name in after if after[name] != before[name]} == written
    assert done.changed_files == ["text_encoder/config.json"]
    again = Pipeline(tmp_path / "out")
    assert again.keys() == {*pipeline, "text_encoder.lm_head.weight"}
    assert bytes(again["unet.conv_in.weight"].read()) == b"\1" * 216
    assert again.parts["text_encoder."].config["tie_word_embeddings"] is False
    assert {row["path"] for row in done.files} == after.keys()
    assert done.written == {name: blake3(bytes(ref.read())).hexdigest() for name, ref in again.items()}
    assert {name: digest for name, digest in done.read.items() if name not in changed} == {
        name: blake3(bytes(ref.read())).hexdigest() for name, ref in pipeline.items() if name not in changed
    }
    assert told[-1] == (again.nbytes, again.nbytes) and [step for step, _ in told] == sorted(step for step, _ in told)


def test_untouched_it_is_copied_and_receipts_of_its_own_are_not(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", MODELS)
    (base / "loratools.json").write_text("{}")
    write_pickled(base / "image_encoder", UNET)  # not listed
    done = Pipeline(base).rewrite(tmp_path / "out", {})
    before, after = files(base), files(tmp_path / "out")
    assert after == {name: data for name, data in before.items() if name not in ("loratools.json", "image_encoder/pytorch_model.bin")}
    assert [row["name"] for row in done.left_out] == ["image_encoder/pytorch_model.bin"]


@pytest.mark.parametrize("changes", [True, False])
def test_a_model_in_pickles(tmp_path: Path, changes: bool) -> None:
    """Written as safetensors where it changes, else copied as it is."""
    base = write_pipeline(tmp_path / "base", MODELS, text_encoder_2=["transformers", "LlamaModel"])
    tensors = {"a.weight": randn(4, 4, seed=0), "b.weight": randn(4, 4, seed=1)}
    write_pickled(base / "text_encoder_2", tensors, {}, shards=2)
    pipeline = Pipeline(base)
    change = {"text_encoder_2.a.weight": constant(Spec("F32", (4, 4)))} if changes else {}
    done = pipeline.rewrite(tmp_path / "out", change)
    written = {path.name for path in (tmp_path / "out" / "text_encoder_2").iterdir()}
    kind = "model{}.safetensors" if changes else "pytorch_model{}.bin"
    assert written == {"config.json", kind.format("") + ".index.json", kind.format("-00001-of-00002"), kind.format("-00002-of-00002")}
    assert bytes(Pipeline(tmp_path / "out")["text_encoder_2.b.weight"].read()) == raw(tensors["b.weight"])
    assert [note.split(":")[:2] for note in done.notes] == [["text_encoder_2", " written as safetensors"]] * 2 * changes


def test_a_part_of_another_kind_is_copied_whole_and_one_that_is_not_there_is_said(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", MODELS, onnx_part=["onnx", "Model"], lost=["diffusers", "Gone"])
    (base / "onnx_part").mkdir()
    (base / "onnx_part" / "model.onnx").write_bytes(b"graph")
    pipeline = Pipeline(base)
    assert pipeline.notes == ["model_index.json lists lost, and there is no such folder"]
    pipeline.rewrite(tmp_path / "out", {})
    assert (tmp_path / "out" / "onnx_part" / "model.onnx").read_bytes() == b"graph"


def test_faults_of_all_models_are_told(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", MODELS)
    (base / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (base / "unet" / "diffusion_pytorch_model.safetensors").rename(base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (base / "unet" / "diffusion_pytorch_model.bf16.safetensors").write_bytes(b"")
    with pytest.raises(LoratoolsError) as caught:
        Pipeline(base)
    first, second = str(caught.value).splitlines()
    assert "unet: holds several models" in first and first.endswith("; leave one of them in the folder")
    assert "vae/diffusion_pytorch_model.safetensors: not a safetensors file" in second


def edit(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edited(base: Path) -> None:
        table = json.loads((base / "model_index.json").read_text())
        change(table)
        (base / "model_index.json").write_text(json.dumps(table))

    return edited


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (edit(lambda table: table.update({"../x": ["a", "b"]})), r"model_index\.json: a part's name must be letters.*found '\.\./x'"),
        (edit(lambda table: table.clear()), "a pipeline none of whose folders holds weights"),
        (lambda base: (base / "model_index.json").write_text("[]"), r"model_index\.json: not a JSON object"),
    ],
)
def test_a_list_that_lies(tmp_path: Path, spoil: Callable[[Path], object], said: str) -> None:
    base = write_pipeline(tmp_path / "base", MODELS)
    spoil(base)
    with pytest.raises(FormatError, match=said):
        open_checkpoint(base)


def test_a_checkpoint_by_itself_refuses_a_pipeline(tmp_path: Path) -> None:
    """Who asks for one model is told to name one."""
    with pytest.raises(AmbiguousError, match=r"a pipeline of several models; name one of its folders"):
        Checkpoint(write_pipeline(tmp_path / "base", MODELS))
    assert len(open_checkpoint(write_checkpoint(tmp_path / "plain", UNET)).parts) == 1
