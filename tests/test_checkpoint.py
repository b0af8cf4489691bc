"""checkpoint: the weights it finds, and what it says of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.checkpoint import Checkpoint
from loratools.errors import FormatError, LoratoolsError
from loratools.tensorfile import TensorFile
from tests.conftest import llama_config, llama_tensors
from tests.files import halves, raw, read_checkpoint, write_checkpoint, write_pickled

# -- opening


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_tensors_come_by_name_in_file_order(tmp_path: Path, shards: int) -> None:
    tensors = llama_tensors()
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "base", tensors, llama_config(), shards=shards))
    assert set(checkpoint) == set(tensors)
    assert len(checkpoint.files) == shards
    assert {name: spec.shape for name, spec in checkpoint.specs.items()} == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.config["model_type"] == "llama"
    assert not checkpoint.single


def test_one_file_an_index_and_a_folder_are_ways_to_the_same(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one", llama_tensors(), llama_config())
    two = write_checkpoint(tmp_path / "two", llama_tensors(), llama_config(), shards=2)
    by_file, by_index = Checkpoint(one / "model.safetensors"), Checkpoint(two / "model.safetensors.index.json")
    assert by_file.specs == Checkpoint(one).specs
    assert dict(sorted(by_index.specs.items())) == dict(sorted(by_file.specs.items()))
    assert by_file.single
    assert not by_index.single


@pytest.mark.parametrize(
    ("present", "opened"),
    [
        (["model.safetensors", "model.fp16.safetensors", "other.safetensors"], "model.safetensors"),
        (["model.safetensors", "consolidated.safetensors"], "model.safetensors"),
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["model.fp16.safetensors"], "model.fp16.safetensors"),
        (["model.safetensors", "adapter_model.safetensors"], "model.safetensors"),
        (["some-finetune.safetensors", "adapter_model.safetensors"], "some-finetune.safetensors"),
    ],
)
def test_the_file_transformers_would_load_is_the_model(tmp_path: Path, present: list[str], opened: str) -> None:
    for name in present:
        save_file({"x": torch.ones(2)}, tmp_path / name)
    assert list(Checkpoint(tmp_path).files) == [opened]


def test_an_index_wins_over_single_files_of_other_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_tensors(), shards=2)
    save_file({"x": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert len(Checkpoint(tmp_path).files) == 2


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    write_checkpoint(blobs, llama_tensors(), llama_config())
    (snapshot / "1_Pooling").mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (blobs / "pooling").write_text("{}")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/pooling")
    (snapshot / "gone.txt").symlink_to("../../blobs/gone")
    done = Checkpoint(snapshot).rewrite(tmp_path / "out", {})
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"
    assert [(row["name"], row["reason"]) for row in done.left_out] == [("gone.txt", "a link to nothing")]


def test_a_blob_that_is_gone_from_the_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(FormatError, match=r"model\.safetensors: cannot be read: No such file"):
        Checkpoint(tmp_path)


def test_all_faults_of_an_index_are_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_tensors(), shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {"ghost": "model-00001-of-00002.safetensors", "lm_head.weight": "model-00001-of-00002.safetensors"}
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(LoratoolsError) as caught:
        Checkpoint(tmp_path)
    assert len(str(caught.value).splitlines()) == 3


def test_headers_are_all_that_opening_reads(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors())
    path = base / "model.safetensors"
    size = path.stat().st_size
    header = TensorFile(path).size - Checkpoint(base).nbytes
    os.truncate(path, header)
    os.truncate(path, size)  # the data is now a hole of zeros
    assert set(Checkpoint(base)) == set(llama_tensors())


# -- torch's pickles


def test_what_cannot_be_mapped_is_read_and_said(tmp_path: Path) -> None:
    torch.save(llama_tensors(), tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    checkpoint = Checkpoint(tmp_path / "x.bin")
    assert checkpoint.notes == ["x.bin is of a torch before 1.6: it cannot be mapped, and is read whole"]
    assert bytes(checkpoint["lm_head.weight"].read()) == raw(llama_tensors()["lm_head.weight"])


@pytest.mark.parametrize("shards", [1, 2])
def test_a_tied_head_is_left_out_as_transformers_leaves_it(tmp_path: Path, shards: int) -> None:
    base = write_pickled(tmp_path / "base", halves(llama_tensors()), llama_config(tie_word_embeddings=True), shards=shards)
    if shards > 1:  # transformers keeps names of one tensor in one shard
        first, last = (base / f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2))
        one, two = torch.load(first), torch.load(last)
        one["lm_head.weight"] = one["model.embed_tokens.weight"]
        del two["lm_head.weight"]
        torch.save(one, first)
        torch.save(two, last)
        index = json.loads((base / "pytorch_model.bin.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = first.name
        (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(base)
    assert "lm_head.weight" not in checkpoint and checkpoint.shared == []
    assert checkpoint.notes == ["left out, as it is tied to model.embed_tokens.weight: lm_head.weight"]
    checkpoint.rewrite(tmp_path / "out", {})
    again = Checkpoint(tmp_path / "out")
    assert sorted(again) == sorted(llama_tensors(head=False))
    if shards > 1:
        table = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert table["metadata"]["total_size"] == again.nbytes and "lm_head.weight" not in table["weight_map"]


@pytest.mark.parametrize("config", [llama_config(tie_word_embeddings=False), {}])
def test_names_of_one_tensor_that_nothing_ties_are_all_written(tmp_path: Path, config: dict[str, object]) -> None:
    base = write_pickled(tmp_path / "base", halves(llama_tensors()), config)
    checkpoint = Checkpoint(base)
    assert checkpoint.shared == [("model.embed_tokens.weight", "lm_head.weight")]
    said = "one tensor in pytorch_model.bin, written as a tensor each: model.embed_tokens.weight, lm_head.weight"
    assert checkpoint.notes == [said]
    checkpoint.rewrite(tmp_path / "out", {})
    found = read_checkpoint(tmp_path / "out")
    assert raw(found["lm_head.weight"]) == raw(found["model.embed_tokens.weight"]) == raw(llama_tensors()["model.embed_tokens.weight"])


def test_tied_biases_and_shared_embeddings_are_left_out_too(tmp_path: Path) -> None:
    W, b = torch.ones(9, 4), torch.ones(9)
    bert = {
        "bert.embeddings.word_embeddings.weight": W, "cls.predictions.transform.dense.weight": torch.ones(4, 4),
        "cls.predictions.bias": b, "cls.predictions.decoder.weight": W, "cls.predictions.decoder.bias": b,
    }  # fmt: skip
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "tie_word_embeddings": True}
    checkpoint = Checkpoint(write_pickled(tmp_path / "bert", bert, config))
    assert set(bert) - set(checkpoint) == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": True}
    checkpoint = Checkpoint(write_pickled(tmp_path / "t5", dict.fromkeys(names, W), config))
    assert list(checkpoint) == ["shared.weight"] and len(checkpoint.notes) == 3 and not checkpoint.shared
