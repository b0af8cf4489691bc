"""Bad adapters in every format: a line that names the file and the tensor, what was found and expected; nothing at OUT.

A small adapter of each format that merges (the first test) is spoilt in one way. What looks bad and is read by a rule stands in
`RULES`, with the rule's trap in the reference of formats beside it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import merge
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, LoratoolsError
from loratools.formats import load
from tests.formats.adapters import SMALL, Small, kohya

Spoil = Callable[[Small], Any]


def lacking(side: str) -> Spoil:
    return lambda small: small.tensors.pop(getattr(small, side))


def made(side: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return lambda small: small.tensors.update({getattr(small, side): change(small.tensors[getattr(small, side)])})


def resized(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.ones([rank if size == 2 else size for size in tensor.shape])


def swapped(small: Small) -> None:
    small.tensors[small.a], small.tensors[small.b] = small.tensors[small.b], small.tensors[small.a]


def no_rank(small: Small) -> None:
    for key in (small.a, small.b):
        small.tensors[key] = resized(small.tensors[key], 0)


def based(name: Callable[[str], str], change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    def spoil(small: Small) -> None:
        small.base = {name(key): change(tensor) for key, tensor in small.base.items()}

    return spoil


def with_tensors(more: dict[str, torch.Tensor]) -> Spoil:
    return lambda small: small.tensors.update(more)


# what is wrong, how, and what the message has beside the file; {a}, {b} are keys of the pair, `|` parts ways of telling the place
WRONG: list[tuple[str, Spoil, tuple[str, ...]]] = [
    ("no A", lacking("a"), ("{b}|{native}", "beside it|that the file lacks", "incomplete|{a}")),
    ("no B", lacking("b"), ("{a}|{native}", "beside it|that the file lacks", "incomplete|{b}")),
    ("ranks that differ", made("a", lambda A: resized(A, 3)), ("{a}|{native}", "do not meet", r"3", "expected")),
    ("A and B swapped", swapped, ("{a}|{native}", "do not meet|above in and out", "expected")),
    ("A as a vector", made("a", torch.flatten), ("{a}|{native}", r"\[12\]", "expected")),
    ("rank 0", no_rank, ("{a}|{native}", "rank 0|found 0|0\\]")),
    ("whole numbers", made("a", lambda A: A.int()), ("{a}|{base}", "floating-point", "found I32")),
    ("nan", made("b", lambda B: B * torch.nan), ("{base}", "inf or nan")),
    (
        "another network's base", based(lambda name: "encoder." + name[::-1], lambda W: W),
        ("weight", "in the base|the base has no", "found a base with"),
    ),
    (
        "a wider base", based(str, lambda W: torch.ones(W.shape[0], W.shape[1] + 1)),
        ("{base}", "does not fit", r"found \[\d+, 6\]", r", 7\]"),
    ),
    ("no tensors", lambda small: small.tensors.clear(), ("no tensors in it",)),
]  # fmt: skip


def error_of(small: Small, folder: Path) -> list[str]:
    """The lines of the merge's error, the folder taken off; nothing is written."""
    base, adapter = small.write(folder)
    with pytest.raises(LoratoolsError) as caught:
        merge(base, adapter, folder / "out", **small.words)
    assert not (folder / "out").exists()
    lines = str(caught.value).replace(f"{folder}/", "").splitlines()
    assert all(line.startswith(f"adapter/{small.file}: ") for line in lines), lines
    return lines


@pytest.mark.parametrize("format", SMALL)
def test_the_adapters_that_are_spoilt_below_merge(tmp_path: Path, format: str) -> None:
    small = SMALL[format]()
    base, adapter = small.write(tmp_path)
    assert load(adapter, options=None if not small.words else _options(small)).format == format
    assert merge(base, adapter, tmp_path / "out", **small.words)["applied"] == len(small.base)


def _options(small: Small) -> Any:
    from loratools.formats.base import read_options

    return read_options(small.words)


@pytest.mark.parametrize(("spoil", "parts"), [case[1:] for case in WRONG], ids=[case[0].replace(" ", "-") for case in WRONG])
@pytest.mark.parametrize("format", SMALL)
def test_spoilt(tmp_path: Path, format: str, spoil: Spoil, parts: tuple[str, ...]) -> None:
    small = SMALL[format]()
    places = {"a": small.a, "b": small.b, "base": next(iter(small.base)), "native": small.a.removesuffix("/A")}
    spoil(small)
    lines = error_of(small, tmp_path)
    wanted = [re.sub(r"\{(\w+)\}", lambda match: re.escape(places[match[1]]), part) for part in parts]
    assert any(all(re.search(part, line) for part in wanted) for line in lines), (wanted, lines)


STRAY = {name: make for name, make in SMALL.items() if name not in ("loralib", "scratch")}  # whose other tensors are whole ones


@pytest.mark.parametrize("format", STRAY)
def test_a_tensor_of_no_kind(tmp_path: Path, format: str) -> None:
    small = STRAY[format]()
    small.tensors["mystery.tensor"] = torch.ones(3)
    assert any(": mystery.tensor: " in line for line in error_of(small, tmp_path))


@pytest.mark.parametrize("format", ["loralib", "scratch"])
def test_a_tensor_that_is_new_is_added_and_said(tmp_path: Path, format: str) -> None:
    small = SMALL[format]()
    small.tensors["mystery.tensor"] = torch.ones(3)
    base, adapter = small.write(tmp_path)
    assert "added: mystery.tensor F32 [3], which the base lacks" in merge(base, adapter, tmp_path / "out", **small.words)["notes"]


# -- alphas in the file: kohya's, ComfyUI's and diffusers'

WITH_ALPHA = ("kohya", "comfyui", "diffusers")


def alpha_key(small: Small) -> str:
    return re.sub(r"\.lora(?:_A|_down|\.down)\.weight$", ".alpha", small.a)


BAD_ALPHAS = [
    (
        "0", torch.tensor(0.0),
        "alpha is 0, which kohya reads as the rank and ComfyUI as no effect; give the one it was trained with by --alpha-in A",
    ),
    ("nan", torch.tensor(torch.nan), "alpha is not finite: found nan"),
    ("inf", torch.tensor(-torch.inf), "alpha is not finite: found -inf"),
    ("two", torch.ones(2), "alpha is not one number: found F32 [2]"),
    ("none", torch.ones(0), "alpha is not one number: found F32 [0]"),
    ("complex", torch.tensor(1j), "alpha is not a number that can be read: found C64 []"),
]  # fmt: skip


@pytest.mark.parametrize(("alpha", "said"), [case[1:] for case in BAD_ALPHAS], ids=[case[0] for case in BAD_ALPHAS])
@pytest.mark.parametrize("format", WITH_ALPHA)
def test_bad_alphas(tmp_path: Path, format: str, alpha: torch.Tensor, said: str) -> None:
    small = SMALL[format]()
    small.tensors[alpha_key(small)] = alpha
    line = f"adapter/{small.file}: {alpha_key(small)}: {said}"
    assert line in error_of(small, tmp_path)


RULES = [  # traps 4 and 28: whatever the dtype, with no axis or one; a negative one turns the change round
    *[(str(dtype).removeprefix("torch."), torch.tensor(3, dtype=dtype), 1.5)
      for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8)],
    ("one axis", torch.tensor([3.0]), 1.5),
    ("two axes", torch.tensor([[3]]), 1.5),
    ("negative", torch.tensor(-3.0), -1.5),
]  # fmt: skip


@pytest.mark.parametrize(("alpha", "scaling"), [case[1:] for case in RULES], ids=[case[0].replace(" ", "-") for case in RULES])
@pytest.mark.parametrize("format", WITH_ALPHA)
def test_alphas_as_they_are_found(tmp_path: Path, format: str, alpha: torch.Tensor, scaling: float) -> None:
    small = SMALL[format]()
    small.tensors[alpha_key(small)] = alpha
    delta = next(iter(load(small.write(tmp_path)[1]).values()))
    assert isinstance(delta, LowRank) and delta.scaling == scaling


def test_an_alpha_of_nothing(tmp_path: Path) -> None:
    small = kohya()
    small.tensors["lora_unet_x.alpha"] = torch.tensor(1.0)
    assert error_of(small, tmp_path) == ["adapter/adapter_model.safetensors: lora_unet_x.alpha: no kind of change that is known"]


def test_alpha_0_is_settled_by_the_option(tmp_path: Path) -> None:
    small = kohya()
    small.tensors[alpha_key(small)] = torch.tensor(0.0)
    base, adapter = small.write(tmp_path)
    with pytest.raises(AmbiguousError):
        load(adapter)
    merge(base, adapter, tmp_path / "out", alpha_in=4.0)


# -- several in one file


def joined(first: str, second: str) -> Small:
    one, other = SMALL[first](), SMALL[second]()
    one.tensors |= other.tensors
    one.metadata = {**(one.metadata or {}), **(other.metadata or {})} or None
    one.words |= other.words
    return one


TOGETHER = [
    ("kohya", "diffusers", ("several formats claim it", "kohya (6 of 10 keys)", "diffusers (", "a file of its own")),
    ("kohya", "comfyui", ("several formats claim it", "kohya (6 of 10 keys), comfyui (4 of 10 keys)")),
    ("comfyui", "diffusers", ("several formats claim it", "comfyui (4 of 8 keys)")),
    ("loralib", "scratch", ("several formats claim it", "loralib (4 of 8 keys), scratch (4 of 8 keys)")),
    ("cloneofsimo", "samlora", ("several formats claim it", "cloneofsimo (8 of 16 keys), samlora (8 of 16 keys)")),
    ("kohya", "samlora", ("several formats claim it", "kohya (6 of 14 keys), samlora (8 of 14 keys)")),
    ("xlabs", "cloneofsimo", ("several formats claim it", "cloneofsimo (8 of 12 keys)", "xlabs (4 of 12 keys)")),
    ("loratools", "kohya", ("several formats claim it", "kohya (6 of 10 keys)", "loratools (")),
    ("kohya", "mlx", ("down_blocks.0.fc.lora_a: no tensor of this family",)),
    ("kohya", "peft", ("base_model.model.down_blocks.0.fc.lora_A.weight: no kind of change that is known",)),
    ("peft", "kohya", ("lora_unet_down_blocks_0_fc.alpha",)),
    ("mlx", "kohya", ("lora_unet_down_blocks_0_fc.lora_down.weight: not a key MLX writes beside LoRA",)),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "said"), TOGETHER, ids=[f"{first}-{second}" for first, second, _ in TOGETHER])
def test_two_formats_in_one_file(tmp_path: Path, first: str, second: str, said: tuple[str, ...]) -> None:
    lines = error_of(joined(first, second), tmp_path)
    assert any(all(part in line for part in said) for line in lines), lines


# -- a module twice, halves of other kinds

FLAT = "lora_unet_down_blocks_0_fc"
PEFT_CONFIG, MLX_CONFIG = SMALL["peft"]().config, SMALL["mlx"]().config
TWICE: list[tuple[str, str, dict[str, torch.Tensor], str]] = [
    (
        "two spellings", "diffusers", {"down_blocks.0.fc.lora_A.weight": torch.ones(2, 6)},
        "down_blocks.0.fc.lora_A.weight: the same tensor twice under two spellings: found down_blocks.0.fc.lora.down.weight|"
        "down_blocks.0.fc.lora.down.weight: the same tensor twice under two spellings: found down_blocks.0.fc.lora_A.weight",
    ),
    (
        "a suffix with and without its dot", "kohya", {f"{FLAT}_lora_down.weight": torch.ones(2, 6)},
        f"{FLAT}_lora_down.weight: the same tensor twice under two spellings: found {FLAT}.lora_down.weight|"
        f"{FLAT}.lora_down.weight: the same tensor twice under two spellings: found {FLAT}.lora_down.weight",
    ),
    (
        "two prefixes", "kohya",
        {"lycoris_down_blocks_0_fc.lora_down.weight": torch.ones(2, 6), "lycoris_down_blocks_0_fc.lora_up.weight": torch.ones(4, 2)},
        "two of the adapter's modules are one of the base's",
    ),
    ("two numbers", "cloneofsimo", {"unet:00:up": torch.ones(6, 2)}, "unet:0:up: the same tensor twice|unet:00:up: the same tensor twice"),
    ("a number of four digits", "samlora", {"w_a_0000": torch.ones(2, 6)}, "w_a_0000: not a key of this format"),
    (
        "another root", "xlabs", {"diffusion_model.double_blocks.0.processor.proj_lora1.up.weight": torch.ones(4, 2)},
        "double_blocks.0.processor.proj_lora1.up.weight: the same tensor twice under two spellings",
    ),
    (
        "a core of two ranks", "kohya",
        {
            "lora_unet_x.lora_mid.weight": torch.ones(2, 3, 3, 3), "lora_unet_x.lora_down.weight": torch.ones(3, 4, 1, 1),
            "lora_unet_x.lora_up.weight": torch.ones(5, 2, 1, 1),
        },
        "lora_unet_x.lora_mid.weight: not a core of one rank: found [2, 3, 3, 3], expected [r, r, *kernel]",
    ),
    ("mid alone", "kohya", {"lora_unet_x.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "lora_mid.weight: has no lora_down.weight beside it"),
    (
        "two biases", "comfyui", {"diffusion_model.x.diff_b": torch.ones(4), "diffusion_model.x.b_norm": torch.ones(4)},
        "diffusion_model.x.b_norm: two differences of one bias",
    ),
    (
        "a LoRA's bias and a whole one", "comfyui",
        {"diffusion_model.down_blocks.0.fc.lora_B.bias": torch.ones(4), "diffusion_model.down_blocks.0.fc.diff_b": torch.ones(4)},
        "diffusion_model.down_blocks.0.fc.diff_b: two differences of one bias",
    ),
    (
        "two magnitudes", "comfyui",
        {
            "diffusion_model.down_blocks.0.fc.dora_scale": torch.ones(4, 1),
            "diffusion_model.down_blocks.0.fc.lora_magnitude_vector": torch.ones(4),
        },
        "dora_scale: magnitudes under two spellings: found diffusion_model.down_blocks.0.fc.lora_magnitude_vector",
    ),
    ("half a LoHa", "kohya", {"lora_unet_x.hada_w1_a": torch.ones(4, 2)}, "lora_unet_x.hada_w1_a: has no hada_w1_b beside it"),
    ("half a LoKr", "kohya", {"lora_unet_x.lokr_w2": torch.ones(4, 2)}, "lora_unet_x.lokr_w2: has no lokr_w1 beside it"),
    ("a magnitude alone", "comfyui", {"diffusion_model.x.dora_scale": torch.ones(4, 1)}, "dora_scale: has no lora_down.weight beside it"),
    ("two kinds", "kohya", {f"{FLAT}.diff": torch.ones(4, 6)}, "of several kinds at once: found lora_down.weight, diff"),
    (
        "a gap", "cloneofsimo", {"unet:9:up": torch.ones(6, 2), "unet:9:down": torch.ones(2, 6)},
        "unet:4:up: modules are counted without gaps",
    ),
    ("another part", "cloneofsimo", {"vae:0:up": torch.ones(6, 2)}, "vae:0:up: a part whose modules are not known"),
    ("a head without an alpha", "samlora", {"fc_6in_3out": torch.ones(3, 6)}, "alpha is not in the file: it is an argument of LoRA-ViT's"),
    ("a third factor", "loralib", {"down_blocks.0.fc.weight": torch.ones(4, 6)}, "whether the LoRA is already merged"),
    ("no layer of its", "scratch", {"down_blocks.0.fc.linear.weight": torch.ones(4, 5)}, "the factors do not fit the layer"),
    ("an m of no size", "mlx", {"down_blocks.0.fc.m": torch.ones(3)}, "the magnitude does not fit its factors: found [3], expected [4]"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "more", "said"), [case[1:] for case in TWICE], ids=[case[0].replace(" ", "-") for case in TWICE])
def test_what_does_not_belong_together(tmp_path: Path, format: str, more: dict[str, torch.Tensor], said: str) -> None:
    small = SMALL[format]()
    small.tensors |= more
    lines = error_of(small, tmp_path)
    assert any(part in line for part in said.split("|") for line in lines), lines


@pytest.mark.parametrize("format", [name for name in SMALL if name not in ("peft", "mlx")])
@pytest.mark.parametrize("config", ["peft", "mlx"])
def test_another_adapters_config_beside_it(tmp_path: Path, format: str, config: str) -> None:
    """peft's and MLX's configs claim the folder, and the error tells either of both claims or of keys that are not theirs."""
    if (config, format) == ("peft", "comfyui"):
        pytest.skip("keys that peft reads too: the prefix is its base's")
    small = SMALL[format]()
    small.config = PEFT_CONFIG if config == "peft" else MLX_CONFIG
    lines = error_of(small, tmp_path)
    told = ("does the adapter_config.json beside it belong to it?", "not a key", "neither", "lacks", "incomplete")
    assert any(part in line for part in told for line in lines), lines


def test_peft_tensors_beside_mlxs_config(tmp_path: Path) -> None:
    small = SMALL["peft"]()
    small.config = MLX_CONFIG
    assert "base_model.model.down_blocks.0.fc.lora_A.weight: not a key MLX writes beside LoRA" in error_of(small, tmp_path)[0]


def test_a_file_of_sixteen_bytes(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(struct.pack("<Q", 8) + b"{}      ")
    with pytest.raises(LoratoolsError, match=r"adapter\.safetensors: no tensors in it$"):
        load(path)


def test_there_are_enough_of_them() -> None:
    assert len(WRONG) * len(SMALL) + len(BAD_ALPHAS) * 3 + len(RULES) * 3 + len(TOGETHER) + len(TWICE) >= 180
