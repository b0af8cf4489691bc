"""What of a path goes to the Hub, what stays, and what is refused before anything is asked of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import LoratoolsError
from loratools.formats import save
from loratools.formats.reading import DEFAULTS
from loratools.ops.convert import convert
from loratools.ops.merge import merge
from loratools.ops.verify import verify
from loratools.workflows._outgoing import Outgoing, outgoing
from loratools.workflows._recorded import receipt_of
from tests.files import llama_config, llama_tensors, peft_config, read_adapter, write_adapter, write_checkpoint
from tests.ops._bases import llama_lora, lora, pipeline
from tests.workflows._adapters import MADE

JUNK = ("optimizer.pt", ".env", "training.log", "token", "checkpoint-5/adapter_model.safetensors", "other.safetensors", "wandb/run.txt")


def gathered(path: Path, base_model: str | None = None) -> Outgoing:
    return outgoing(path, base_model, dict(DEFAULTS))  # type: ignore[arg-type]


def litter(folder: Path) -> None:
    for name in JUNK:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("hf_secret")


@contextmanager
def refused(said: str) -> Iterator[None]:
    """An error whose one line holds these words."""
    with pytest.raises(LoratoolsError) as caught:
        yield
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return llama_lora(tmp_path / "adapter")


def test_of_an_adapter_its_own_files_go_and_the_rest_stays(adapter: Path) -> None:
    litter(adapter)
    found = gathered(adapter, "ada/base")
    assert set(found.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert [row["path"] for row in found.left] == [
        ".env", "checkpoint-5/", "optimizer.pt", "other.safetensors", "token", "training.log", "wandb/",
    ]  # fmt: skip


def test_the_base_is_named_in_what_goes_up_and_not_in_the_local_file(adapter: Path) -> None:
    before = (adapter / "adapter_config.json").read_bytes()
    found = gathered(adapter, "ada/base")
    told = found.files["adapter_config.json"]
    assert isinstance(told, bytes) and json.loads(told) == json.loads(before) | {"base_model_name_or_path": "ada/base"}
    assert (adapter / "adapter_config.json").read_bytes() == before
    assert any("goes up with base_model_name_or_path = ada/base" in note for note in found.notes)


def test_a_config_that_names_its_base_goes_up_as_it_is(tmp_path: Path) -> None:
    path = lora(tmp_path / "a", {"m.q_proj": (4, 4)}, base_model_name_or_path="ada/base")
    found = gathered(path)
    assert found.files["adapter_config.json"] == path / "adapter_config.json" and found.bases == ["ada/base"]
    told = gathered(path, "gpt2").files["adapter_config.json"]
    assert isinstance(told, bytes) and json.loads(told)["base_model_name_or_path"] == "gpt2"


def test_one_file_goes_with_its_receipt(tmp_path: Path, adapter: Path) -> None:
    save(MADE["plain"](), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "s.safetensors", format="kohya")
    found = gathered(tmp_path / "s.safetensors", "ada/base")
    assert set(found.files) == {"s.safetensors", "s.safetensors.loratools.json"} and found.left == []
    assert found.receipt is not None and found.receipt["operation"] == "convert"


def test_a_receipt_of_another_file_stays(tmp_path: Path) -> None:
    save(MADE["plain"](), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", format="mlx")
    shutil.copy(tmp_path / "b/loratools.json", tmp_path / "a/loratools.json")
    found = gathered(tmp_path / "a", "ada/base")
    assert set(found.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert [row["path"] for row in found.left] == ["loratools.json"] and any("no receipt" in note for note in found.notes)


# -- a merged model


@pytest.fixture
def merged(tmp_path: Path, adapter: Path) -> Path:
    base = write_checkpoint(tmp_path / "base", llama_tensors(), llama_config(), shards=2)
    for name in ("tokenizer.json", "README.md", "LICENSE", "notes.txt"):
        (base / name).write_text("---\nlicense: mit\n---\nbase's\n")
    merge(base, adapter, tmp_path / "merged", reversible=True)
    return tmp_path / "merged"


def test_of_a_merge_weights_config_tokenizer_licence_and_receipt_go(merged: Path) -> None:
    litter(merged)
    (merged / "other.safetensors").unlink()
    found = gathered(merged, "ada/base")
    shards = {f"model-0000{place}-of-00002.safetensors" for place in (1, 2)}
    sides = {"model.safetensors.index.json", "config.json", "tokenizer.json", "LICENSE", "loratools.json"}
    assert set(found.files) == shards | sides
    assert found.relation == "merge" and found.bases == ["ada/base"]
    assert {row["path"] for row in found.left} >= {"unmerge.safetensors", "notes.txt", ".env", "optimizer.pt", "checkpoint-5/"}
    assert found.card is None and found.base_card is not None and "the base's own" in found.notes[-2] + found.notes[-1]
    (merged / "README.md").write_text("# Mine\n")
    assert gathered(merged, "ada/base").card == "# Mine\n"


def test_the_receipt_that_goes_up_is_true_of_what_goes_up(merged: Path, tmp_path: Path) -> None:
    found = gathered(merged, "ada/base")
    assert found.receipt is not None
    files: dict[str, Path | bytes] = {**found.files, "README.md": b"# Another\n"}
    told = receipt_of(found.receipt, files)
    assert told is not None
    notes = json.loads(told)["notes"]
    assert notes[-2:] == ["push: written anew: README.md", "push: not published: notes.txt, unmerge.safetensors"]
    for name, data in (files | {"loratools.json": told}).items():
        (tmp_path / "up").mkdir(exist_ok=True)
        (tmp_path / "up" / name).write_bytes(data if isinstance(data, bytes) else data.read_bytes())
    assert verify(tmp_path / "up")["faults"] == []
    assert receipt_of(found.receipt | {"outputs": []}, files) is None


def test_of_a_pipeline_the_models_that_it_lists_go(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    lora(tmp_path / "a", {"unet.mid.attn.to_q": (8, 8)})
    (base / "stray").mkdir()
    (base / "stray/x.json").write_text("{}")
    merge(base, tmp_path / "a", tmp_path / "merged")
    found = gathered(tmp_path / "merged", "ada/base")
    assert {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json"} <= set(found.files)
    assert {"scheduler/scheduler_config.json", "tokenizer/vocab.json", "text_encoder/model.safetensors"} <= set(found.files)
    assert "loratools.json" in found.files and "README.md" not in found.files
    assert [row["path"] for row in found.left] == ["stray/"]


# -- what is refused


def spoiled(value: float, letter: str = "B") -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors, config = read_adapter(path)
        write_adapter(path, {name: torch.full_like(t, value) if f"lora_{letter}" in name else t for name, t in tensors.items()}, config)

    return spoil


def configured(**more: Any) -> Callable[[Path], None]:
    return lambda path: write_adapter(path, *(lambda tensors, config: (tensors, config | more))(*read_adapter(path))) and None


@pytest.mark.parametrize(
    ("spoil", "base", "said"),
    [
        (spoiled(float("nan")), "ada/base", "q_proj.weight: B has 16 non-finite values; loratools inspect --values shows all"),
        (spoiled(float("inf"), "A"), "ada/base", "q_proj.weight: A has 16 non-finite values"),
        (spoiled(0.0), "ada/base", "changes nothing: every ΔW is zero; was it trained?"),
        (spoiled(0.0, "A"), "ada/base", "changes nothing: every ΔW is zero; was it trained?"),
        (configured(lora_alpha=0), "ada/base", "changes nothing: every ΔW is zero; was it trained?"),
        (configured(), None, "does not tell which model it is for; --base-model ID names it"),
        (configured(base_model_name_or_path=""), None, "does not tell which model it is for"),
        (configured(base_model_name_or_path="/home/me/llama"), None, "is a path of this machine: found /home/me/llama; --base-model ID"),
        (configured(base_model_name_or_path="."), None, "is a path of this machine: found .; --base-model ID"),
        (configured(base_model_name_or_path="../m"), None, "base_model_name_or_path is a path of this machine: found ../m"),
        (configured(), "./here", "--base-model: found ./here, expected a model's id on the Hub, such as user/name"),
        (configured(), "a/b/c", "--base-model: found a/b/c"),
    ],
)
def test_adapters_that_are_refused(adapter: Path, spoil: Callable[[Path], None], base: str | None, said: str) -> None:
    spoil(adapter)
    with pytest.raises(LoratoolsError) as caught:
        gathered(adapter, base)
    assert said in str(caught.value)
    assert all(line for line in str(caught.value).splitlines())


def test_one_module_that_is_zero_is_no_reason(adapter: Path) -> None:
    tensors, config = read_adapter(adapter)
    first = next(name for name in tensors if "lora_B" in name)
    write_adapter(adapter, tensors | {first: torch.zeros_like(tensors[first])}, config)
    assert any("B is zero" in text for text in gathered(adapter, "ada/base").report["warnings"])


def test_a_base_that_is_a_folder_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lora(tmp_path / "a", {"m.q_proj": (4, 4)}, base_model_name_or_path="models/llama")
    monkeypatch.chdir(tmp_path)
    assert gathered(path).bases == ["models/llama"]
    (tmp_path / "models/llama").mkdir(parents=True)
    with refused("base_model_name_or_path is a path of this machine: found models/llama"):
        gathered(path)
    assert gathered(path, "models/llama").bases == ["models/llama"]  # whoever names it means the Hub's


def test_weights_that_are_not_those_of_the_receipt(tmp_path: Path) -> None:
    save(MADE["plain"](), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    tensors, config = read_adapter(tmp_path / "b")
    write_adapter(tmp_path / "b", {name: tensor + 1 for name, tensor in tensors.items()}, config)
    with refused("not the bytes that its receipt tells of; move loratools.json away, if"):
        gathered(tmp_path / "b", "ada/base")


def test_models_that_are_refused(tmp_path: Path, merged: Path) -> None:
    with refused("neither an adapter nor a merge of loratools': found no receipt; push what merge wrote"):
        gathered(tmp_path / "base", "ada/base")
    with refused("loratools.json: its base is a path of a machine: found "):
        gathered(merged)
    with refused("no such file or folder"):
        gathered(tmp_path / "nowhere", "ada/base")
    tensors = {name: tensor.clone() for name, tensor in llama_tensors().items()}
    tensors["model.norm.weight"][0] = float("nan")
    base = write_checkpoint(tmp_path / "odd", tensors, llama_config())
    merge(base, tmp_path / "adapter", tmp_path / "bad")
    with refused("model.norm.weight: has 1 non-finite values"):
        gathered(tmp_path / "bad", "ada/base")
    (merged / "config.json").write_text("{}")
    with refused("config.json: not the bytes that were written"):
        gathered(merged, "ada/base")


def test_a_card_that_is_no_text(adapter: Path) -> None:
    (adapter / "README.md").write_bytes(b"\xff\xfe")
    with refused("README.md: a card that is no UTF-8; save it as UTF-8"):
        gathered(adapter, "ada/base")


def test_paths_of_this_machine_in_a_receipt_are_told(merged: Path, adapter: Path) -> None:
    assert any(note.startswith("loratools.json tells paths of this machine, and is public: /") for note in gathered(merged, "a/b").notes)
    assert peft_config()["r"] == 2 and not any("public" in note for note in gathered(adapter, "a/b").notes)
