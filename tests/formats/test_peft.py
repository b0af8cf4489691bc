"""peft's files, decoded: every spelling of a key, what the config makes of it, and that each stray or lacking tensor is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError, LoratoolsError, MatchError, ShapeError, UnsupportedError
from loratools.formats import load, save
from loratools.formats.base import ReadOptions
from loratools.refs import Spec
from loratools.tensors import read_tensor
from tests.files import peft_config, write_adapter
from tests.strategies import randn

ROOT = "base_model.model."
A, B = randn(2, 6, seed=0), randn(4, 2, seed=1)
PAIR = {"q.lora_A.weight": A, "q.lora_B.weight": B}


def read(folder: Path, tensors: dict[str, Tensor], *, root: str = ROOT, options: ReadOptions | None = None, **config: Any) -> Adapter:
    """An adapter of these tensors, by way of files."""
    given = peft_config(target_modules=["q"]) | config
    return load(write_adapter(folder / "adapter", {root + key: tensor for key, tensor in tensors.items()}, given), options=options)


def low(adapter: Adapter, name: str = "q.weight") -> LowRank:
    delta = adapter[name]
    delta = delta.direction if isinstance(delta, DoRA) else delta
    assert isinstance(delta, LowRank)
    return delta


def same(ref: Any, tensor: Tensor) -> bool:
    return torch.equal(read_tensor(ref), tensor)


SPELLINGS = {
    "saved": "base_model.model.q.{}.weight",
    "live, with the adapter's name": "base_model.model.q.{}.default.weight",
    "another adapter's name": "base_model.model.q.{}.my-style_2.weight",
    "without the prefix": "q.{}.weight",
    "the prefix twice": "base_model.model.base_model.model.q.{}.weight",
    "the prefix in a model": "model.base_model.model.q.{}.weight",
    "DDP outside": "module.base_model.model.q.{}.weight",
    "DDP inside": "base_model.model.module.q.{}.weight",
    "compiled": "_orig_mod.base_model.model.q.{}.weight",
    "compiled inside": "base_model.model._orig_mod.q.{}.default.weight",
    "FSDP": "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.q.{}.weight",
    "checkpointed": "base_model.model._checkpoint_wrapped_module.q.{}.weight",
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=list(SPELLINGS))
@pytest.mark.parametrize("module", ["q", "model.layers.0.default.q", "model.lora.q", "base_model.q"])
def test_every_spelling_of_a_key(tmp_path: Path, spelling: str, module: str) -> None:
    keys = [spelling.replace("q.{}", f"{module}.{marker}") for marker in ("lora_A", "lora_B")]
    adapter = read(tmp_path, dict(zip(keys, (A, B), strict=True)), root="")
    assert list(adapter) == [f"{module}.weight"]
    assert same(low(adapter, f"{module}.weight").A, A) and same(low(adapter, f"{module}.weight").B, B)


@pytest.mark.parametrize("spelling", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"])
def test_three_spellings_of_a_magnitude(tmp_path: Path, spelling: str) -> None:
    delta = read(tmp_path, PAIR | {f"q.{spelling}": torch.arange(4.0)}, use_dora=True)["q.weight"]
    assert isinstance(delta, DoRA) and delta.axis == "out" and same(delta.magnitude, torch.arange(4.0).reshape(4, 1))


@pytest.mark.parametrize("infix", ["", ".default"])
def test_embeddings(tmp_path: Path, infix: str) -> None:
    tensors = {f"q.lora_embedding_A{infix}": randn(2, 9, seed=0), f"q.lora_embedding_B{infix}": randn(5, 2, seed=1)}
    delta = read(tmp_path, tensors | {"q.lora_magnitude_vector": torch.arange(5.0)}, use_dora=True)["q.weight"]
    assert isinstance(delta, DoRA) and delta.axis == "in" and delta.direction.shape() == (9, 5)
    assert low(Adapter({"q.weight": delta})).layer == "embedding"


@pytest.mark.parametrize("kernel", [(3,), (1,), (3, 2), (1, 1), (1, 1, 1), (2, 1, 3)])
def test_convolutions(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    ones = (1,) * len(kernel)
    tensors = {"q.lora_A.weight": randn(2, 5, *kernel, seed=0), "q.lora_B.weight": randn(7, 2, *ones, seed=1)}
    delta = read(tmp_path, tensors | {"q.lora_magnitude_vector": torch.ones(1, 7, *ones)}, use_dora=True)["q.weight"]
    assert isinstance(delta, DoRA) and delta.direction.shape() == (7, 5, *kernel) and delta.magnitude.spec.shape == (7, 1, *ones)


def test_a_pickle_holds_the_same(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", {ROOT + key: tensor for key, tensor in PAIR.items()}, peft_config(target_modules=["q"]))
    (folder / "adapter_model.safetensors").unlink()
    whole = torch.arange(100.0).reshape(10, 10)
    torch.save(
        {ROOT + "q.lora_A.weight": whole[2:4, :6].requires_grad_(), ROOT + "q.lora_B.weight": B.T.contiguous().T},
        folder / "adapter_model.bin",
    )
    found = low(load(folder))
    assert same(found.A, whole[2:4, :6].detach()) and same(found.B, B)


def test_saved_modules_biases_and_lora_on_what_is_saved(tmp_path: Path) -> None:
    value = randn(4, 6, seed=3)
    tensors = PAIR | {
        "head.weight": value,
        "head.out.bias": torch.ones(3),
        "q.base_layer.weight": value,
        "q.base_layer.bias": torch.ones(4),
        "n.bias": torch.ones(2),
    }
    adapter = read(tmp_path, tensors, modules_to_save=["head"], bias="all")
    kinds = {name: type(delta) for name, delta in adapter.items()}
    assert kinds == {
        "q.weight": Chain,
        "head.weight": Replacement,
        "head.out.bias": Replacement,
        "q.bias": Replacement,
        "n.bias": Replacement,
    }


def test_a_bias_difference_is_scaled_and_comes_after_a_saved_bias(tmp_path: Path) -> None:
    tensors = PAIR | {"q.lora_B.bias": torch.ones(4), "q.base_layer.bias": torch.ones(4)}
    delta = read(tmp_path, tensors, lora_bias=True, use_rslora=True, bias="lora_only")["q.bias"]
    assert isinstance(delta, Chain) and isinstance(delta.then, Full) and delta.then.scale == 4 / 2**0.5


# what peft writes beside a saved module where it also saves all biases, or the embeddings
COPIES = {
    "head.weight": randn(4, 6, seed=3),
    "head.modules_to_save.weight": randn(4, 6, seed=3),
    "head.original_module.weight": randn(4, 6, seed=5),
}


def test_second_copies_are_told_and_must_be_alike(tmp_path: Path) -> None:
    adapter = read(tmp_path, PAIR | COPIES, modules_to_save=["head"])
    assert set(adapter) == {"q.weight", "head.weight"} and same(adapter["head.weight"].refs()["value"], COPIES["head.weight"])
    assert any("head.original_module.weight" in note and "head.modules_to_save.weight" in note for note in adapter.notes)
    with pytest.raises(FormatError, match="not alike"):
        read(tmp_path / "unlike", PAIR | COPIES | {"head.modules_to_save.weight": randn(4, 6, seed=4)}, modules_to_save=["head"])
    with pytest.raises(FormatError, match="live state dict"):
        read(tmp_path / "alone", PAIR | {"head.original_module.weight": A}, modules_to_save=["head"])


@pytest.mark.parametrize("key", ["head.modules_to_save.default.weight", "head.modules_to_save.weight", "head.weight"])
def test_spellings_of_a_saved_module(tmp_path: Path, key: str) -> None:
    assert "head.weight" in read(tmp_path, PAIR | {key: A}, modules_to_save=["head"])
    child = key.replace("weight", "dense.weight").replace("modules_to_save.dense", "modules_to_save.x.dense")
    assert "head.dense.weight" in read(tmp_path / "child", PAIR | {child: A}, modules_to_save=["head"])


SAVED_UNASKED = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    "transformer.wte.weight",
    "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias",
]


@pytest.mark.parametrize("name", SAVED_UNASKED)
def test_embeddings_and_heads_are_saved_unasked(tmp_path: Path, name: str) -> None:
    assert isinstance(read(tmp_path, PAIR | {name: A})[name], Replacement)


def test_a_tied_head_is_adapted_unlisted(tmp_path: Path) -> None:
    tensors = PAIR | {"lm_head.lora_A.weight": A, "lm_head.lora_B.weight": B}
    assert "lm_head.weight" in read(tmp_path, tensors, ensure_weight_tying=True)
    with pytest.raises(MatchError, match=r"lm_head\.lora_A\.weight: the config does not target"):
        read(tmp_path / "untied", tensors)


def test_the_users_word_on_orientation(tmp_path: Path) -> None:
    adapter = read(tmp_path, PAIR, options=ReadOptions(transposed=("q",)))
    assert low(adapter).layer == "transposed" and low(adapter).shape() == (6, 4)


FAULTS: dict[str, tuple[dict[str, Tensor], dict[str, Any], type[LoratoolsError], str]] = {
    "B is missing": ({"q.lora_A.weight": A}, {}, FormatError, r"q\.lora_A\.weight: has no lora_B"),
    "A is missing": ({"q.lora_B.weight": B}, {}, FormatError, r"q\.lora_B\.weight: has no lora_A"),
    "only a magnitude": ({"q.lora_magnitude_vector": B[0]}, {"use_dora": True}, FormatError, "q.lora_magnitude_vector: has no lora_A"),
    "A and B swapped": ({"q.lora_A.weight": B, "q.lora_B.weight": A}, {}, ShapeError, "A and B do not meet"),
    "another rank": (PAIR, {"r": 3}, ShapeError, r"q\.lora_A\.weight: the rank is not the config's: found 2, expected 3"),
    "transposed pair": ({"q.lora_A.weight": A.T, "q.lora_B.weight": B.T}, {}, ShapeError, "do not meet"),
    "a vector": ({"q.lora_A.weight": A[0], "q.lora_B.weight": B}, {}, ShapeError, "not a LoRA pair"),
    "a kernel on B": (
        {"q.lora_A.weight": randn(2, 3, 3, 3, seed=0), "q.lora_B.weight": randn(4, 2, 3, 3, seed=0)}, {}, ShapeError,
        "not a LoRA pair",
    ),
    "groups": (
        {"q.lora_A.weight": randn(2, 4, 3, seed=0), "q.lora_B.weight": randn(4, 1, 1, seed=0)}, {}, UnsupportedError, "grouped convolution"
    ),
    "twice": (PAIR | {"q.lora_A.default.weight": A}, {}, FormatError, "the same tensor twice"),
    "two adapters": (
        {"q.lora_A.one.weight": A, "q.lora_B.one.weight": B, "k.lora_A.two.weight": A, "k.lora_B.two.weight": B},
        {"target_modules": ["q", "k"]}, FormatError, "holds several adapters: found one, two",
    ),
    "half without prefix": ({"q.lora_A.weight": A}, {}, FormatError, "has no lora_B"),
    "no magnitude": (PAIR, {"use_dora": True}, FormatError, "has no lora_magnitude_vector"),
    "a magnitude too many": (PAIR | {"q.lora_magnitude_vector": torch.ones(4)}, {}, FormatError, "without use_dora"),
    "a magnitude of another size": (PAIR | {"q.lora_magnitude_vector": torch.ones(6)}, {"use_dora": True}, ShapeError, "does not fit"),
    "a magnitude of another shape": (PAIR | {"q.lora_magnitude_vector": torch.ones(4, 1)}, {"use_dora": True}, ShapeError, "does not fit"),
    "a bias without lora_bias": (PAIR | {"q.lora_B.bias": torch.ones(4)}, {}, FormatError, "lora_B.bias without lora_bias"),
    "lora_bias without a bias": (PAIR, {"lora_bias": True}, FormatError, "has no lora_B.bias"),
    "a bias of another size": (PAIR | {"q.lora_B.bias": torch.ones(3)}, {"lora_bias": True}, ShapeError, "does not fit lora_B"),
    "a bias on A": (PAIR | {"q.lora_A.bias": torch.ones(2)}, {}, FormatError, "not a key peft writes"),
    "a bare marker": (PAIR | {"k.lora_A": A}, {"target_modules": ["q", "k"]}, FormatError, "not a key peft writes"),
    "linear and embedding": (PAIR | {"q.lora_embedding_A": A, "q.lora_embedding_B": B}, {}, FormatError, "on one module"),
    "not targeted": (PAIR, {"target_modules": ["k"]}, MatchError, "does not target this module"),
    "excluded": (PAIR, {"exclude_modules": ["q"]}, MatchError, "does not target this module"),
    "inside a saved module": (PAIR, {"modules_to_save": ["q"]}, MatchError, "does not target this module"),
    "an unlisted whole tensor": (PAIR | {"norm.weight": A}, {}, MatchError, r"norm\.weight: neither a tensor of the method"),
    "an unlisted bias": (PAIR | {"q.bias": torch.ones(4)}, {}, MatchError, r"q\.bias: neither"),
    "a bias elsewhere under lora_only": (PAIR | {"k.bias": torch.ones(4)}, {"bias": "lora_only"}, MatchError, r"k\.bias: neither"),
    "nothing": ({"norm.weight": A}, {}, MatchError, "neither a tensor of the method"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_tensor(tmp_path: Path, name: str) -> None:
    tensors, config, kind, words = FAULTS[name]
    with pytest.raises(kind, match=words) as caught:
        read(tmp_path, tensors, **config)
    assert "adapter_model.safetensors" in str(caught.value)


def test_all_faults_of_a_file_are_shown_together(tmp_path: Path) -> None:
    with pytest.raises(LoratoolsError) as caught:
        read(tmp_path, PAIR | {"a.weight": A, "b.weight": A, "q.lora_B.foo.bar": B})
    assert len(str(caught.value).splitlines()) == 3


def test_some_keys_with_the_prefix_and_some_without(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"q\.lora_B\.weight: lacks the prefix"):
        read(tmp_path, {ROOT + "q.lora_A.weight": A, "q.lora_B.weight": B}, root="")


def test_tensors_without_their_config_need_the_alpha(tmp_path: Path) -> None:
    """The scale is in no tensor: nobody is asked to guess it, and it can be told."""
    save_file({ROOT + key: tensor.clone() for key, tensor in PAIR.items()}, tmp_path / "alone.safetensors")
    with pytest.raises(FormatError, match=r"names a peft_type.*--from peft --alpha-in A tells it"):
        load(tmp_path / "alone.safetensors")
    with pytest.raises(FormatError, match=r"lora_alpha is missing.*--alpha-in"):
        load(tmp_path / "alone.safetensors", options=ReadOptions(format="peft"))
    adapter = load(tmp_path / "alone.safetensors", options=ReadOptions(format="peft", alpha=6.0))
    assert low(adapter, "q.weight").scaling == 6.0 / A.shape[0] and adapter.format == "peft"


def test_a_file_that_lists_its_whole_tensors_means_those_biases_and_no_others(tmp_path: Path) -> None:
    """bias="all" means every bias of the model; the list in the metadata is exact."""
    base = {f"h.{i}.{leaf}": Spec("F32", (4, 6) if leaf == "q.weight" else (4,)) for i in range(2) for leaf in ("q.weight", "q.bias")}
    pair = {f"h.{i}.{key}": tensor for i in range(2) for key, tensor in PAIR.items()} | {"h.0.q.base_layer.bias": torch.ones(4)}
    folder = write_adapter(
        tmp_path / "a", {ROOT + key: value for key, value in pair.items()}, peft_config(target_modules=["q"], bias="all")
    )
    with pytest.raises(MatchError, match=r"h\.1\.q\.bias: the adapter's config covers this weight"):
        load(folder).resolve(base)
    save(load(folder), tmp_path / "again")
    assert set(load(tmp_path / "again").resolve(base)) == {"h.0.q.weight", "h.1.q.weight", "h.0.q.bias"}
    written = tmp_path / "again/adapter_model.safetensors"
    save_file(
        {key: tensor for key, tensor in load_file(written).items() if "bias" not in key}, written, {"loratools.saved": '["h.0.q.bias"]'}
    )
    with pytest.raises(FormatError, match=r"h\.0\.q\.bias: listed among the saved tensors, and not in the file"):
        load(tmp_path / "again")


@pytest.mark.parametrize("listed", ["not json", "3", '["a", 1]'])
def test_a_list_that_is_none(tmp_path: Path, listed: str) -> None:
    folder = write_adapter(tmp_path / "a", {ROOT + key: tensor for key, tensor in PAIR.items()}, peft_config(target_modules=["q"]))
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors", metadata={"loratools.saved": listed})
    with pytest.raises(FormatError, match=r"loratools\.saved is not a list of names"):
        load(folder)
