"""cloneofsimo's files: numbers meet the modules that the project's own search comes past, in live models of diffusers and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from loratools import convert, merge
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, LoratoolsError, MatchError, NotExpressible, ShapeError, UnsupportedError
from loratools.formats import encode, load
from loratools.formats._walks import ERAS, stable_diffusion, walk
from loratools.formats.base import ReadOptions
from loratools.refs import Spec
from tests.files import raw, read_checkpoint, write_checkpoint
from tests.strategies import randn

NORMAL, EXTENDED = {"CrossAttention", "Attention", "GEGLU"}, {"CrossAttention", "Attention", "GEGLU", "ResnetBlock2D"}


def unet(**more: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, cross_attention_dim=6, norm_num_groups=2, attention_head_dim=2, sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **more,
    )  # fmt: skip


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=40, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=1
    )
    return CLIPTextModel(config)


def found(model: nn.Module, targets: set[str], kinds: tuple[type, ...] = (nn.Linear,)) -> list[str]:
    """What lora_diffusion's `_find_modules_v2` yields: layers below modules of the target classes, as `named_modules` has them."""
    owners = [(name, module) for name, module in model.named_modules() if type(module).__name__ in targets]
    return [f"{owner}.{name}.weight" for owner, below in owners for name, module in below.named_modules() if isinstance(module, kinds)]


@pytest.mark.parametrize(("targets", "kinds"), [(NORMAL, (nn.Linear,)), (EXTENDED, (nn.Linear, nn.Conv2d))])
def test_modules_are_counted_as_the_project_finds_them(targets: set[str], kinds: tuple[type, ...]) -> None:
    model = unet()
    assert walk(sorted(model.state_dict()), targets, ERAS[1]) == found(model, targets, kinds)
    texts = text_encoder()
    assert walk(sorted(texts.state_dict()), ["CLIPAttention"], ERAS[0]) == found(texts, {"CLIPAttention"})


@pytest.mark.parametrize(("version", "cross"), [(1, 768), (2, 1024)])
def test_the_tables_are_stable_diffusions_networks(version: int, cross: int) -> None:
    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=cross)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = found(model, EXTENDED, (nn.Linear, nn.Conv2d))
    assert {name: spec.shape for name, spec in stable_diffusion("unet", version).items()} == {name: shapes[name] for name in names}


def factors(shape: tuple[int, ...], seed: int, rank: int = 2) -> tuple[Tensor, Tensor]:
    return randn(shape[0], rank, *(1,) * (len(shape) - 2), seed=seed), randn(rank, *shape[1:], seed=seed + 1000)


def counted(part: str, names: list[str], shapes: dict[str, Any]) -> dict[str, Tensor]:
    tensors = {}
    for index, name in enumerate(names):
        tensors[f"{part}:{index}:up"], tensors[f"{part}:{index}:down"] = factors(tuple(shapes[name].shape), index)
    return tensors


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("told", [True, False])
def test_merges_onto_the_modules_of_their_numbers(tmp_path: Path, era: str, told: bool) -> None:
    """Extended files with convolutions too, in either order of registration, with the classes told and without."""
    weights = dict(unet().state_dict())
    names = walk(weights, EXTENDED, era)
    tensors = counted("unet", names, weights)
    save_file(tensors, tmp_path / "lora.safetensors", {"unet": json.dumps(sorted(EXTENDED))} if told else None)
    write_checkpoint(tmp_path / "base", weights)
    assert merge(tmp_path / "base", tmp_path / "lora.safetensors", tmp_path / "out")["applied"] == len(names)
    out = read_checkpoint(tmp_path / "out")
    for index, name in enumerate(names):
        up, down = (tensors[f"unet:{index}:{side}"].double() for side in ("up", "down"))
        expected = weights[name].double() + (up.flatten(1) @ down.flatten(1)).reshape(weights[name].shape)
        assert torch.equal(out[name], expected.float()), name


def test_a_list_in_a_pickle(tmp_path: Path) -> None:
    """The older form, the UNet's and the text encoder's; tensors that want gradients, as the project saves them."""
    for model, file, targets in ((unet(), "lora.pt", NORMAL), (text_encoder(), "lora.text_encoder.pt", {"CLIPAttention"})):
        weights = dict(model.state_dict())
        names = found(model, targets)
        pairs = [factors(tuple(weights[name].shape), index) for index, name in enumerate(names)]
        torch.save([nn.Parameter(tensor) for pair in pairs for tensor in pair], tmp_path / file)
        write_checkpoint(tmp_path / f"{file}-base", weights)
        receipt = merge(tmp_path / f"{file}-base", tmp_path / file, tmp_path / f"{file}-out")
        assert receipt["applied"] == len(names)
        out = read_checkpoint(tmp_path / f"{file}-out")
        for (up, down), name in zip(pairs, names, strict=True):
            assert torch.equal(out[name], (weights[name].double() + up.double() @ down.double()).float()), name
    torch.save({"<krk>": torch.ones(8)}, tmp_path / "lora.ti.pt")
    note = "lora.text_encoder.pt, lora.ti.pt beside it belongs to the same run, and is read as an adapter of its own"
    assert load(tmp_path / "lora.pt").notes == (note,)


def low(adapter: Any) -> list[LowRank]:
    return [delta for delta in adapter.values() if isinstance(delta, LowRank)]


def test_round_trip_keeps_bytes(tmp_path: Path) -> None:
    names = walk(stable_diffusion("unet", 1), NORMAL, ERAS[0])
    texts = walk(stable_diffusion("text_encoder", 1), ["CLIPAttention"], ERAS[0])
    tensors = {"<s1>": torch.ones(768)}
    for part, listed in (("unet", names), ("text_encoder", texts)):
        tensors |= {key: tensor.half() for key, tensor in counted(part, listed, dict(stable_diffusion(part, 1))).items()}
    metadata = {"unet": json.dumps(sorted(NORMAL)), "text_encoder": '["CLIPAttention"]', "<s1>": "<embed>"}
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    convert(tmp_path / "lora.safetensors", tmp_path / "kohya.safetensors", format="kohya")
    convert(tmp_path / "lora.safetensors", tmp_path / "native.safetensors", format="loratools")
    convert(tmp_path / "native.safetensors", tmp_path / "again.safetensors", format="cloneofsimo")
    again = load_file(tmp_path / "again.safetensors")
    assert {key: raw(tensor) for key, tensor in again.items()} == {key: raw(tensor) for key, tensor in tensors.items()}
    container = encode(load(tmp_path / "native.safetensors"), "cloneofsimo")
    assert container.metadata["unet:0:rank"] == "2" and container.metadata["<s1>"] == "<embed>"
    assert json.loads(container.metadata["unet"]) == sorted(NORMAL)


def small(tmp_path: Path, *, count: int = 4, shape: tuple[int, int] = (6, 6), metadata: dict[str, str] | None = None) -> Path:
    tensors = {}
    for index in range(count):
        tensors[f"unet:{index}:up"], tensors[f"unet:{index}:down"] = factors(shape, index)
    save_file(tensors, tmp_path / "small.safetensors", metadata)
    return tmp_path / "small.safetensors"


def specs(*blocks: str, shape: tuple[int, int] = (6, 6)) -> dict[str, Spec]:
    names = [f"mid_block.attentions.0.transformer_blocks.0.{block}.weight" for block in blocks]
    return {name: Spec("F32", shape) for name in names}


ATTENTION = [f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]


def test_bases_that_do_not_fit(tmp_path: Path) -> None:
    adapter = load(small(tmp_path))
    assert list(adapter.resolve(specs(*ATTENTION)))[3].endswith("attn1.to_out.0.weight")
    with pytest.raises(MatchError, match=r"unet:0:up: another number of modules than the base's: found 4, expected 8 modules"):
        adapter.resolve(specs(*ATTENTION, *[name.replace("1", "2") for name in ATTENTION]))
    said = r"unet:0:up: does not fit the module of that number: found \[6, 6\], expected \[6, 7\] of mid_block"
    with pytest.raises(ShapeError, match=said):
        adapter.resolve(specs(*ATTENTION, shape=(6, 7)))
    nine = load(small(tmp_path, count=9))
    with pytest.raises(AmbiguousError, match="its modules fit the base's in two orders"):
        nine.resolve(specs(*ATTENTION, *[name.replace("1", "2") for name in ATTENTION], "ff.net.0.proj"))


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"unet": "x"}, "metadata unet is not a list of classes: found x"),
        ({"unet": '["Transformer2DModel"]'}, "which layers lie below a class is not known: found Transformer2DModel"),
        ({"unet:1:rank": "4"}, "unet:1:down: the rank is not the metadata's: found 2, expected 4|unet:1:up: the rank"),
    ],
)
def test_metadata_that_is_wrong(tmp_path: Path, metadata: dict[str, str], said: str) -> None:
    with pytest.raises((LoratoolsError, UnsupportedError)) as caught:
        load(small(tmp_path, metadata=metadata))
    assert any(part in str(caught.value) for part in said.split("|"))


def test_what_cannot_be_written(tmp_path: Path) -> None:
    adapter = load(small(tmp_path))
    with pytest.raises(NotExpressible, match=r"unet:0\.weight: its file counts modules instead of naming them"):
        encode(adapter, "peft")
    named = adapter.resolve(specs(*ATTENTION))
    with pytest.raises(LoratoolsError, match="lies in no part that these files have"):
        encode(named, "cloneofsimo")
    table = walk(stable_diffusion("text_encoder", 1), ["CLIPAttention"], ERAS[0])
    lows = low(named) * 12
    whole = type(adapter)({f"text_encoder.{name}": delta for name, delta in zip(table, lows, strict=True)})
    assert len(encode(whole, "cloneofsimo").tensors) == 96
    with pytest.raises(NotExpressible, match=r"text_encoder\.encoder\.layers\.11\.\S+: these files count all .* has none for one"):
        encode(type(adapter)(dict(list(whole.items())[:-1])), "cloneofsimo")
    with pytest.raises(LoratoolsError, match=r"no alpha: the scaling is 1: found 2\.0; rescale --bake makes it 1"):
        encode(load(small(tmp_path), options=ReadOptions(alpha=2.0)), "cloneofsimo")
