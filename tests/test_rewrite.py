"""rewrite: the bytes it keeps, the files it copies, leaves out and changes."""

from __future__ import annotations

import errno
import json
import os
import random
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from loratools.checkpoint import Checkpoint
from loratools.digests import combined_digest
from loratools.errors import FormatError
from loratools.refs import BITS, Buffer, Reshaped, Spec, Transposed
from loratools.rewrite import Change, Seen
from loratools.tensorwriter import TensorWriter
from tests.conftest import llama_config, llama_tensors
from tests.files import peft_config, raw, read_checkpoint, write_adapter, write_checkpoint, write_pickled


def every_dtype(path: Path, metadata: dict[str, str] | None = None) -> dict[str, bytes]:
    """A file with a tensor of each dtype of the format, an empty one, a 0-d one and names nobody expects."""
    specs = {f"x.{dtype}": Spec(dtype, (4, 2)) for dtype in BITS}
    specs |= {"empty": Spec("F8_E4M3", (0, 3)), "one": Spec("I64", ()), 'é "q"\n': Spec("U8", (3,))}
    writer = TensorWriter(path, specs, metadata)
    tensors = {name: random.Random(name).randbytes(spec.nbytes) for name, spec in specs.items()}
    for name, data in tensors.items():
        writer.write(name, [data])
    writer.close()
    return tensors


def filled(byte: bytes) -> Callable[[Spec], Change]:
    """A change to a tensor of one byte's repetition."""

    def change(spec: Spec) -> Change:
        def blocks(seen: Seen) -> Iterable[Buffer]:
            yield byte * spec.nbytes

        return Change(spec, blocks)

    return change


# -- weights, config and index


@pytest.mark.parametrize("workers", [1, 3])
def test_every_dtype_passes_as_bytes_and_headers_stay(tmp_path: Path, workers: int) -> None:
    (tmp_path / "base").mkdir()
    tensors = every_dtype(tmp_path / "base" / "model.safetensors", {"format": "pt", "note": "é"})
    done = Checkpoint(tmp_path / "base").rewrite(tmp_path / "out", {}, workers=workers)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
    digests = {name: blake3(data).hexdigest() for name, data in tensors.items()}
    assert done.read == done.written == digests
    assert [row["blake3"] for row in done.files] == [combined_digest(digests)]
    assert not done.changed_files


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("workers", [1, 4])
def test_changed_and_added_tensors_and_nothing_else(tmp_path: Path, shards: int, workers: int) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(), llama_config(), shards=shards)
    checkpoint = Checkpoint(base)
    larger = Spec("BF16", (19, 8))
    change = {"model.embed_tokens.weight": filled(b"\1")(larger)}
    added = {"score.weight": filled(b"\2")(Spec("F32", (2, 8)))}
    done = checkpoint.rewrite(tmp_path / "out", change, added=added, config={"vocab_size": 19}, workers=workers)
    again = Checkpoint(tmp_path / "out")
    assert list(again) == [*checkpoint, "score.weight"]
    for name, ref in checkpoint.items():
        if name not in change:
            assert bytes(again[name].read()) == bytes(ref.read())
    assert again["model.embed_tokens.weight"].spec == larger
    assert bytes(again["score.weight"].read()) == b"\2" * 64
    assert again.config == llama_config(vocab_size=19)
    assert list(again.files) == list(checkpoint.files)
    assert [file.metadata for file in again.files.values()] == [file.metadata for file in checkpoint.files.values()]
    assert set(done.changed_files) == {"config.json"} | ({"model.safetensors.index.json"} if shards > 1 else set())
    if shards > 1:
        before, after = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (base, tmp_path / "out"))
        assert after["metadata"]["total_size"] == again.nbytes
        assert after["weight_map"] == before["weight_map"] | {"score.weight": list(again.files)[-1]}


def test_other_numbers_of_an_index_follow_and_what_is_no_number_stays(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(), shards=2)
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"] |= {"total_parameters": 100, "mergekit_version": "0.1"}
    path.write_text(json.dumps(index))
    Checkpoint(base).rewrite(tmp_path / "out", {}, added={"x": filled(b"1")(Spec("F32", (5,)))})
    metadata = json.loads((tmp_path / "out" / path.name).read_text())["metadata"]
    assert (metadata["total_parameters"], metadata["mergekit_version"]) == (105, "0.1")


def test_an_index_and_a_config_that_do_not_change_are_copied_byte_for_byte(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(), shards=2)
    odd = '{"tie_word_embeddings":false ,\r\n "x": 1e5,"é":"\\u00e9"}'
    (base / "config.json").write_bytes(odd.encode())
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("\n", "\n\n"))
    change = {"lm_head.weight": filled(b"\0")(Spec("F32", (17, 8)))}
    done = Checkpoint(base).rewrite(tmp_path / "out", change, config={"tie_word_embeddings": False})
    for name in ("config.json", index.name):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert done.changed_files == []


def test_config_keys_are_set_where_they_stand(tmp_path: Path) -> None:
    config = {"text_config": {"vocab_size": 17, "hidden_size": 8}, "tie_word_embeddings": True, "gone": 1}
    base = write_checkpoint(tmp_path / "base", llama_tensors(), config)
    Checkpoint(base).rewrite(tmp_path / "out", {}, config={"vocab_size": 19, "tie_word_embeddings": False, "gone": None})
    assert Checkpoint(tmp_path / "out").config == {"text_config": {"vocab_size": 19, "hidden_size": 8}, "tie_word_embeddings": False}


def test_a_change_that_fails_names_file_and_tensor(tmp_path: Path) -> None:
    def blocks(seen: Seen) -> Iterable[Buffer]:
        raise FormatError("broken")

    checkpoint = Checkpoint(write_checkpoint(tmp_path / "base", llama_tensors()))
    with pytest.raises(FormatError, match=r"base: lm_head\.weight: broken"):
        checkpoint.rewrite(tmp_path / "out", {"lm_head.weight": Change(checkpoint.specs["lm_head.weight"], blocks)})


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "base", llama_tensors(), shards=2))
    checkpoint.rewrite(tmp_path / "out", {}, workers=2, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (checkpoint.nbytes, checkpoint.nbytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """48 MB pass through; what Python holds at any time is a few blocks of 1 MB."""
    write_checkpoint(tmp_path / "base", {str(number): torch.zeros(1 << 20) for number in range(12)})
    tracemalloc.start()
    try:
        Checkpoint(tmp_path / "base").rewrite(tmp_path / "out", {}, workers=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20


# -- the files beside the weights

KEPT = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "generation_config.json", "chat_template.jinja", "preprocessor_config.json", "1_Pooling/config.json", "modules.json", "README.md",
    "LICENSE", ".gitattributes", "modeling_custom.py", "assets/picture.png", "trainer_state.json", "deep/original/notes.txt", "name é.txt",
)  # fmt: skip
LEFT = (
    "pytorch_model.bin", "pytorch_model.bin.index.json", "model.fp16.safetensors", "model.safetensors.index.fp16.json",
    "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.onnx", "model.onnx_data", "onnx/model.onnx.data", "model-q4.gguf",
    "consolidated.00.pth", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "2_Dense/model.safetensors", "last.ckpt",
    "adapter_model.safetensors",
)  # fmt: skip
PRUNED = ("original/params.json", ".cache/huggingface/download/x.lock", ".git/HEAD", "code/__pycache__/a.pyc", "sub/.ipynb_checkpoints/b")


def test_what_a_real_folder_holds_is_copied_or_listed(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(), llama_config())
    for number, name in enumerate((*KEPT, *LEFT, *PRUNED)):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(bytes([number]) * number)
    (base / "loratools.json").write_text("{}")
    (base / "linked").symlink_to("assets")
    os.mkfifo(base / "pipe")
    done = Checkpoint(base).rewrite(tmp_path / "out", {})
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {"model.safetensors", "config.json", *KEPT}
    for name in KEPT:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    reasons = {row["name"]: row["reason"] for row in done.left_out}
    folders = {"original/", ".cache/", ".git/", "code/__pycache__/", "sub/.ipynb_checkpoints/", "linked/"}
    assert set(reasons) == {*LEFT, *folders, "pipe"}
    assert reasons["2_Dense/model.safetensors"] == "weights in a folder of their own, not looked at"
    assert {row["path"] for row in done.files} == written
    for row in done.files:
        if row["path"] != "model.safetensors":
            data = (tmp_path / "out" / row["path"]).read_bytes()
            assert (row["bytes"], row["blake3"]) == (len(data), blake3(data).hexdigest())


def test_a_single_file_gives_a_single_file_and_takes_nothing_along(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(), llama_config())
    done = Checkpoint(base / "model.safetensors").rewrite(tmp_path / "out.safetensors", {})
    assert (tmp_path / "out.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out.safetensors"]
    assert done.left_out == []


def test_an_index_as_path_rewrites_its_folder(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(), llama_config(), shards=2)
    Checkpoint(base / "model.safetensors.index.json").rewrite(tmp_path / "out", {})
    before, after = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (base, tmp_path / "out"))
    assert after == before


def test_files_get_the_mode_the_umask_gives(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(), llama_config())
    (base / "model.safetensors").chmod(0o600)
    before = os.umask(0o022)
    try:
        Checkpoint(base).rewrite(tmp_path / "out", {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors())
    (base / "closed").mkdir()
    real = os.scandir

    def scandir(path: str) -> object:  # as it is for all but root
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(FormatError, match="closed: cannot be read: Permission denied"):
        Checkpoint(base).rewrite(tmp_path / "out", {})


def test_a_name_that_is_no_text_passes(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors())
    name = os.fsdecode(b"latin\xe9.txt")
    (base / name).write_text("x")
    done = Checkpoint(base).rewrite(tmp_path / "out", {})
    assert (tmp_path / "out" / name).read_text() == "x"
    assert name in [row["path"] for row in done.files]


def test_large_tensors_are_never_read_through_views_that_read_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Reshaped.rows` and `Transposed.rows` read their whole origin each time: fine for factors, and for them alone."""
    from loratools.ops.merge import merge

    seen: list[int] = []
    for view in (Reshaped, Transposed):

        def spied(self: Reshaped | Transposed, start: int, stop: int, original: Callable[..., Buffer] = view.rows) -> Buffer:
            seen.append(self.spec.numel)
            return original(self, start, stop)

        monkeypatch.setattr(view, "rows", spied)
    base = write_checkpoint(tmp_path / "base", llama_tensors() | {"conv.weight": torch.randn(8, 4, 3, 3)}, llama_config())
    root = "base_model.model."
    factors = {
        f"{root}model.embed_tokens.lora_embedding_A": torch.randn(2, 17), f"{root}model.embed_tokens.lora_embedding_B": torch.randn(8, 2),
        f"{root}conv.lora_A.weight": torch.randn(2, 4, 3, 3), f"{root}conv.lora_B.weight": torch.randn(8, 2, 1, 1),
        f"{root}lm_head.weight": torch.randn(17, 8),
    }  # fmt: skip
    config = peft_config(target_modules=["embed_tokens", "conv"], modules_to_save=["lm_head"])
    merge(base, write_adapter(tmp_path / "adapter", factors, config), tmp_path / "out")
    assert all(size <= 2 * 36 for size in seen), seen  # the largest factor: rank 2 by 4·3·3
    assert set(read_checkpoint(tmp_path / "out")) == {*llama_tensors(), "conv.weight"}


# -- torch's pickles


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("stem", ["pytorch_model", "diffusion_pytorch_model"])
def test_pickles_are_written_as_safetensors(tmp_path: Path, shards: int, stem: str) -> None:
    tensors = llama_tensors() | {"turned": torch.randn(6, 40).T, "steps": torch.tensor(3)}
    base = write_pickled(tmp_path / "base", tensors, llama_config(), shards=shards, stem=stem)
    (base / "tf_model.h5").write_bytes(b"old")
    checkpoint = Checkpoint(base)
    assert list(checkpoint) == list(tensors) and not checkpoint.notes
    changed, added = {"turned": filled(b"\1")(Spec("F32", (41, 6)))}, {"new": filled(b"\2")(Spec("U8", (3,)))}
    done = checkpoint.rewrite(tmp_path / "out", changed, added=added, workers=2)
    written = stem.removeprefix("pytorch_")
    shard = [f"-{number:05}-of-{shards:05}" for number in range(1, shards + 1)] if shards > 1 else [""]
    files = [f"{written}{part}.safetensors" for part in shard]
    index = [f"{written}.safetensors.index.json"] if shards > 1 else []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", *files, *index} == {row["path"] for row in done.files}
    assert done.changed_files == index and [row["name"] for row in done.left_out] == ["tf_model.h5"]
    assert done.notes == [f"written as safetensors: {file}, from {stem}{part}.bin" for file, part in zip(files, shard, strict=True)]
    again = Checkpoint(tmp_path / "out")
    assert list(again) == [*tensors, "new"] and [file.metadata for file in again.files.values()] == [{"format": "pt"}] * shards
    assert all(bytes(again[name].read()) == raw(tensor) for name, tensor in tensors.items() if name != "turned")
    assert done.read == {name: blake3(raw(tensor)).hexdigest() for name, tensor in tensors.items() if name != "turned"} | {
        "turned": blake3().hexdigest()
    }
    if index:
        table = json.loads((tmp_path / "out" / index[0]).read_text())
        assert table["metadata"]["total_size"] == again.nbytes and set(table["weight_map"].values()) == set(files)


def test_a_file_of_torch_gives_a_file_of_safetensors(tmp_path: Path) -> None:
    for ending in ("bin", "pt", "pth", "ckpt"):
        torch.save({"state_dict": llama_tensors(), "epoch": 3}, tmp_path / f"x.{ending}")
        checkpoint = Checkpoint(tmp_path / f"x.{ending}")
        done = checkpoint.rewrite(tmp_path / f"{ending}.safetensors", {})
        assert checkpoint.single and checkpoint.notes == [f"not weights, left out of x.{ending}: epoch"]
        assert done.notes == [f"written as safetensors: {ending}.safetensors, from x.{ending}"]
        found = read_checkpoint(tmp_path / f"{ending}.safetensors")
        assert {name: raw(tensor) for name, tensor in found.items()} == {name: raw(tensor) for name, tensor in llama_tensors().items()}
