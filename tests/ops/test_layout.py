"""convert with a layout: names of diffusion networks by the format that is written, or as asked; what can and cannot be said so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import convert
from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.lokr import LoKr
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, LoratoolsError, MatchError, NotExpressible, UsageError
from loratools.formats import load, save
from loratools.ops._layout import layout_for
from loratools.tensors import read_tensor, to_ref
from tests.files import raw, write_checkpoint
from tests.layouts._adapters import dense, low, same
from tests.strategies import randn

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
TO = "transformer.transformer_blocks.0.attn.to_"
SINGLE = "transformer.single_transformer_blocks.0.proj_out.weight"


def kohya(path: Path, modules: Mapping[str, tuple[int, int]]) -> Path:
    tensors: dict[str, Tensor] = {}
    for seed, (module, (out, width)) in enumerate(modules.items()):
        tensors[f"{module}.lora_down.weight"] = randn(2, width, seed=seed)
        tensors[f"{module}.lora_up.weight"] = randn(out, 2, seed=seed + 50)
        tensors[f"{module}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


def flux(path: Path, **more: Delta) -> Path:
    """A diffusers file of a Flux transformer's q, k, v and one more."""
    deltas: dict[str, Delta] = {f"{TO}{part}.weight": low(8, seed=3 * seed) for seed, part in enumerate("qkv")}
    save(Adapter(deltas | {SINGLE: low(8, seed=20)} | more), path, format="diffusers")
    return path


def modules(path: Path) -> set[str]:
    return {key.partition(".lora_")[0] for key in load_file(path) if ".lora_" in key}


def tensors(path: Path) -> dict[str, bytes]:
    return {key: raw(value) for key, value in load_file(path).items()}


def converted(folder: Path, given: Path | Adapter, **words: object) -> tuple[Path, list[str]]:
    out = folder / "out.safetensors"
    return out, convert(given, out, overwrite=True, **words)["notes"]  # type: ignore[arg-type]


# -- by format


def test_a_format_with_one_sides_names_gets_them(tmp_path: Path) -> None:
    given = kohya(tmp_path / "a.safetensors", {QKV: (24, 4), "lora_unet_single_blocks_0_linear2": (4, 4)})
    out, notes = converted(tmp_path, given, format="diffusers")
    assert modules(out) == {*(f"{TO}{part}" for part in "qkv"), SINGLE.removesuffix(".weight")}
    said = "layout diffusers: 2 of 2 names are the other side's (flux, diffusers 0.42); 2 tensors are 4 there"
    assert notes == [f"{said}, as --format diffusers has them"]
    A = load_file(given)[f"{QKV}.lora_down.weight"]
    assert all(torch.equal(load_file(out)[f"{TO}{part}.lora_A.weight"], A) for part in "qkv")
    again, notes = converted(tmp_path, out.rename(tmp_path / "b.safetensors"), format="kohya")
    assert tensors(again) == tensors(given)
    assert "as --format kohya has them" in notes[0]


def test_xlabs_and_cloneofsimo_get_the_names_that_their_files_have(tmp_path: Path) -> None:
    given = flux(tmp_path / "flux.safetensors")
    fused, notes = converted(tmp_path, load(given).map(lambda name, delta: replace(delta, alpha=2.0)), format="xlabs")  # type: ignore[type-var]
    assert set(load_file(fused)) >= {"double_blocks.0.processor.qkv_lora1.down.weight", "single_blocks.0.processor.proj_lora.up.weight"}
    assert any("as --format xlabs has them" in note for note in notes)
    own = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    one = Adapter({"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": low(8)})
    with pytest.raises(NotExpressible, match="these files count all of a Stable Diffusion's modules"):
        converted(tmp_path, one.map(lambda name, delta: replace(delta, alpha=2.0)), format="cloneofsimo")  # type: ignore[type-var]
    assert layout_for(one, "cloneofsimo", None, None)[0].apply(one).keys() == {own}  # type: ignore[union-attr]


def test_flat_names_get_their_dots_for_comfyui(tmp_path: Path) -> None:
    given = kohya(tmp_path / "a.safetensors", {QKV: (24, 4), "lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 4)})
    out, _ = converted(tmp_path, given, format="comfyui")
    text = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    assert modules(out) == {"diffusion_model.double_blocks.0.img_attn.qkv", text}


def test_sd1s_text_encoder(tmp_path: Path) -> None:
    names = {"lora_unet_down_blocks_0_attentions_1_proj_in": (4, 4), "lora_te_text_model_encoder_layers_0_mlp_fc1": (8, 4)}
    given = kohya(tmp_path / "a.safetensors", names | {"lora_unet_up_blocks_1_attentions_2_proj_in": (4, 4)})
    out, _ = converted(tmp_path, given, format="comfyui")
    assert modules(out) == {
        "diffusion_model.input_blocks.2.1.proj_in", "diffusion_model.output_blocks.5.1.proj_in",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    }  # fmt: skip
    out, _ = converted(tmp_path, given, format="kohya", layout="original")
    ldm = {"lora_unet_input_blocks_2_1_proj_in", "lora_unet_output_blocks_5_1_proj_in"}
    assert modules(out) == ldm | {"lora_te_text_model_encoder_layers_0_mlp_fc1"}
    out, _ = converted(tmp_path, out.rename(tmp_path / "b.safetensors"), format="diffusers")
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1" in modules(out)


def test_what_keeps_its_names(tmp_path: Path) -> None:
    given = kohya(tmp_path / "a.safetensors", {QKV: (24, 4)})
    out, notes = converted(tmp_path, given)
    assert load_file(out).keys() == load_file(given).keys() and notes == []
    unet = Adapter({"unet.down_blocks.0.attentions.0.proj_in.weight": low(4)})
    out, notes = converted(tmp_path, unet, format="kohya")  # kohya's trainer reads a UNet's names of both sides
    assert modules(out) == {"lora_unet_down_blocks_0_attentions_0_proj_in"} and notes == []
    out, notes = converted(tmp_path, flux(tmp_path / "f.safetensors"), format="diffusers")
    assert load_file(out).keys() == load_file(tmp_path / "f.safetensors").keys() and notes == []
    out, notes = converted(tmp_path, Adapter({"model.layers.0.q.weight": low(4)}), format="comfyui")
    assert modules(out) == {"diffusion_model.model.layers.0.q"} and notes == []


def test_a_flux_adapter_of_diffusers_for_kohya_and_comfyui(tmp_path: Path) -> None:
    given = flux(tmp_path / "a.safetensors")
    for format, qkv, linear2 in [
        ("kohya", QKV, "lora_unet_single_blocks_0_linear2"),
        ("comfyui", "diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.0.linear2"),
    ]:
        out, notes = converted(tmp_path, given, format=format)
        assert modules(out) == {qkv, linear2} and notes[0].startswith("layout original: 4 of 4 names are the other side's")
        found = load_file(out)
        assert found[f"{qkv}.lora_down.weight"].shape == (6, 4) and found[f"{qkv}.lora_up.weight"].shape == (24, 6)
    kept, _ = converted(tmp_path, given, format="kohya", layout="diffusers")
    assert modules(kept) == {"lora_unet_" + name.removesuffix(".weight").partition(".")[2].replace(".", "_") for name in load(given)}


def test_peft_gets_the_layout_that_is_asked_for(tmp_path: Path) -> None:
    given = kohya(tmp_path / "a.safetensors", {QKV: (24, 4)})
    convert(given, tmp_path / "out", format="peft", layout="diffusers")
    assert set(load(tmp_path / "out")) == {f"{TO}{part}.weight" for part in "qkv"}


# -- kinds


def test_a_kind_is_changed_before_a_weight_is_cut(tmp_path: Path) -> None:
    lokr = LoKr(w1=to_ref(randn(6, 1, seed=1)), w2=to_ref(randn(4, 4, seed=2)), scale=0.5)
    given = Adapter({"diffusion_model.double_blocks.0.img_attn.qkv.weight": lokr})
    with pytest.raises(LoratoolsError, match=r"to_q\.weight: diffusers cannot say a LoKr delta; convert it first: --kind lora"):
        converted(tmp_path, given, format="diffusers")
    out, _ = converted(tmp_path, given, format="diffusers", kind="lora", rank=4)
    parts = load(out)
    assert set(parts) == {f"{TO}{part}.weight" for part in "qkv"}
    whole = 0.5 * torch.kron(read_tensor(lokr.w1, torch.float64), read_tensor(lokr.w2, torch.float64))
    rows = torch.cat([dense(parts[f"{TO}{part}.weight"]) for part in "qkv"])
    assert (rows - whole).abs().max() <= 1e-5 * whole.abs().max()  # factors are stored in float32


def test_what_cannot_be_cut_leaves_nothing(tmp_path: Path) -> None:
    columns = DoRA(direction=low(24), magnitude=to_ref(torch.ones(1, 4)))
    with pytest.raises(NotExpressible, match=r"img_attn\.qkv\.weight: a DoRA delta along the inputs.*convert --kind lora"):
        converted(tmp_path, Adapter({"diffusion_model.double_blocks.0.img_attn.qkv.weight": columns}), format="diffusers")
    assert not (tmp_path / "out.safetensors").exists()


# -- with a base


def test_parts_on_a_fused_base_are_one_change(tmp_path: Path) -> None:
    sizes = {"double_blocks.0.img_attn.qkv": (24, 4), "double_blocks.0.img_attn.proj": (4, 8), "vector_in.in_layer": (4, 4)}
    sizes |= {"single_blocks.0.linear2": (8, 4)}
    base = write_checkpoint(tmp_path / "base", {f"{name}.weight": randn(*size, seed=7) for name, size in sizes.items()})
    parts: dict[str, Delta] = {f"transformer_blocks.0.attn.to_{part}.weight": low(8, seed=3 * seed) for seed, part in enumerate("qk")}
    out, notes = converted(tmp_path, Adapter(parts), format="comfyui", base=base)
    assert any("names aligned: 2 of 2 are others in the base" in note for note in notes)
    (found,) = load(out).values()
    assert isinstance(found, LowRank) and found.rank == 4 and found.scaling == 1.5
    expected = torch.cat([*map(dense, parts.values()), torch.zeros(8, 4, dtype=torch.float64)])
    assert (dense(found) - expected).abs().max() <= 2 * 2.0**-52 * expected.abs().max()
    out, _ = converted(tmp_path, Adapter(parts), format="diffusers", base=base)  # and cut again
    again = load(out)
    assert all(same(again[name], delta) for name, delta in parts.items()) and len(again) == 3


def test_a_base_tells_what_names_do_not(tmp_path: Path) -> None:
    deltas: dict[str, Delta] = {"transformer_blocks.0.attn.to_q.weight": low(8)}
    with pytest.raises(AmbiguousError, match=r"flux or sd3; give the base .* network: --network flux, or choose with --layout"):
        converted(tmp_path, Adapter(deltas), format="kohya")
    own = {f"transformer_blocks.0.attn.to_{part}.weight": randn(8, 4, seed=1) for part in "qkv"}
    more = ("single_transformer_blocks.0.proj_mlp", "transformer_blocks.0.norm1_context.linear", "context_embedder")
    own |= {f"{name}.weight": randn(4, 4, seed=2) for name in more}
    base = write_checkpoint(tmp_path / "base", own | {"time_text_embed.text_embedder.linear_1.weight": randn(4, 4, seed=3)})
    out, _ = converted(tmp_path, Adapter(deltas), format="kohya", base=base)
    assert modules(out) == {QKV}


@pytest.mark.parametrize(("words", "error", "text"), [
    ({"format": "diffusers"}, MatchError, "names of no network.*give the base with --base, whose names tell where the dots are"),
    ({"layout": "diffusers"}, MatchError, "names of no network.*leave out --layout"),
    ({"layout": "bfl"}, UsageError, "--layout: found bfl, expected original or diffusers"),
])  # fmt: skip
def test_names_of_another_model(tmp_path: Path, words: dict[str, str], error: type[LoratoolsError], text: str) -> None:
    given = kohya(tmp_path / "a.safetensors", {"lora_unet_blocks_0_q": (4, 4)})
    with pytest.raises(error, match=text):
        converted(tmp_path, given, **words)
    assert not (tmp_path / "out.safetensors").exists()
