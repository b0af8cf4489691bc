"""Initialisations that change the base, live: merged into the original weights by the adapter at its start, or by the base alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratools import combine, convert, inspect, merge, rescale, resize, unmerge, verify
from loratools.errors import LoratoolsError, OptionError, UnsupportedError
from loratools.formats import load
from tests.files import raw, read_adapter, read_checkpoint, write_adapter, write_checkpoint

WARNINGS = pytest.mark.filterwarnings("ignore")
TARGETS = ["up", "square", "down"]


class Net(nn.Module):
    """Three layers, one of them square, one stored transposed if asked for."""

    def __init__(self, *, conv1d: bool = False) -> None:
        super().__init__()
        self.up = Conv1D(40, 24) if conv1d else nn.Linear(24, 40)
        self.square, self.down = nn.Linear(40, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.square(torch.tanh(self.up(x)))))


def new(dtype: torch.dtype = torch.float32, **more: bool) -> Net:
    torch.manual_seed(0)
    net = Net(**more)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return net.to(dtype)


X = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))


def prepare(net: Net, config: LoraConfig) -> None:
    """What CorDA and LoRA-GA look at before they begin: covariances, gradients."""
    if config.init_lora_weights == "corda":
        preprocess_corda(net, config, run_model=lambda: net(X.to(net.down.weight.dtype)))
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(net, config, train_step=lambda: net(X).square().mean().backward())
        net.zero_grad()


def trained(
    folder: Path, init: str, *, dtype: torch.dtype = torch.float32, step: float = 0.1, as_documented: bool = False, **more: Any
) -> PeftModel:
    """A model under an adapter that was trained from that initialisation; base, first and last adapter are saved below the folder."""
    conv1d = more.pop("conv1d", False)
    net = new(dtype, conv1d=conv1d)
    write_checkpoint(folder / "base", net.state_dict(), {"model_type": "gpt2"} if conv1d else None)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": init} | more
    config = LoraConfig(**settings)
    prepare(net, config)
    model = get_peft_model(net, config)
    if as_documented:
        model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "first")
    if as_documented:
        model.peft_config["default"].init_lora_weights = init
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_((step * noise * parameter.norm() / parameter.numel() ** 0.5).to(parameter.dtype))
    model.eval().save_pretrained(folder / "adapter")
    return model


@torch.no_grad()
def forward(model: nn.Module) -> Tensor:
    found: Tensor = model.double().eval()(X.double())
    return found


def merged(folder: Path, out: str = "out", **more: bool) -> Tensor:
    net = new(**more).double()
    net.load_state_dict(read_checkpoint(folder / out))
    return forward(net)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


INITS: dict[str, dict[str, Any]] = {
    "pissa": {}, "pissa_niter_4": {}, "olora": {}, "corda": {"corda_config": CordaConfig(corda_method="kpm")},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"up": 3}, "alpha_pattern": {"down": 5}},
}  # fmt: skip


PAIRS = [(init, kind) for init in INITS for kind in KINDS if (init, kind) != ("corda", "patterns")]  # its preprocessing knows one rank


@WARNINGS
@pytest.mark.parametrize(("init", "kind"), PAIRS)
def test_with_the_adapter_at_its_start(tmp_path: Path, init: str, kind: str) -> None:
    model = trained(tmp_path, init, **INITS[init], **KINDS[kind])
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", initial=tmp_path / "first")
    assert receipt["applied"] == receipt["expected"] == 3
    expected = forward(model)
    assert apart(merged(tmp_path), expected) <= 1e-5  # peft's residual, itself rounded to float32
    plain = json.loads((tmp_path / "adapter/adapter_config.json").read_text()) | {"init_lora_weights": True}
    write_adapter(tmp_path / "plain", read_adapter(tmp_path / "adapter")[0], plain)
    merge(tmp_path / "base", tmp_path / "plain", tmp_path / "wrong")
    assert apart(merged(tmp_path, "wrong"), expected) > 1e-3


@WARNINGS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_by_the_base_alone(tmp_path: Path, init: str, kind: str) -> None:
    model = trained(tmp_path, init, **KINDS[kind])
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert receipt["applied"] == receipt["expected"] == 3 and {row["kind"] for row in receipt["tensors"]} == {init}
    assert apart(merged(tmp_path), forward(model)) <= 1e-5
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "other", initial=tmp_path / "first")
    assert apart(merged(tmp_path), merged(tmp_path, "other")) <= 1e-5


@WARNINGS
@pytest.mark.parametrize("init", ["pissa", "corda"])
def test_weights_stored_transposed(tmp_path: Path, init: str) -> None:
    model = trained(tmp_path, init, conv1d=True, fan_in_fan_out=True, target_modules=["up"], **INITS[init])
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", initial=tmp_path / "first")
    assert apart(merged(tmp_path, conv1d=True), forward(model)) <= 1e-5
    if init == "pissa":
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "alone")
        assert apart(merged(tmp_path, "alone", conv1d=True), forward(model)) <= 1e-5


@WARNINGS
def test_bfloat16(tmp_path: Path) -> None:
    """peft rounds the residual to the base's dtype before training; the merge rounds once, so they differ by a rounding."""
    model = trained(tmp_path, "pissa", dtype=torch.bfloat16)
    for name, more in (("out", {}), ("other", {"initial": tmp_path / "first"})):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / name, **more)  # type: ignore[arg-type]
        assert apart(merged(tmp_path, name), forward(model)) < 2.0**-6


@WARNINGS
@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga"])
def test_what_only_its_start_tells(tmp_path: Path, init: str) -> None:
    trained(tmp_path, init, **INITS[init])
    for work in (lambda: merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"), lambda: load(tmp_path / "adapter")):
        with pytest.raises(UnsupportedError, match=f"found {init}; give the adapter as it was initialised with --initial, or save it"):
            work()


@WARNINGS
def test_loftq(tmp_path: Path) -> None:
    trained(tmp_path, "pissa")
    tensors, config = read_adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "loftq", tensors, config | {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}})
    for initial in (None, tmp_path / "first"):
        with pytest.raises(UnsupportedError, match="LoftQ quantised the base before training"):
            merge(tmp_path / "base", tmp_path / "loftq", tmp_path / "out", initial=initial)


@WARNINGS
def test_a_base_that_is_a_residual_already(tmp_path: Path) -> None:
    model = trained(tmp_path, "pissa")
    held = model.base_model.model.state_dict()
    write_checkpoint(tmp_path / "residual", {name.replace(".base_layer", ""): held[name] for name in held if "lora_" not in name})
    with pytest.raises(LoratoolsError, match=r"weight: the factors did not come from what pissa moves from this weight"):
        merge(tmp_path / "residual", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@WARNINGS
@pytest.mark.parametrize("as_documented", [True, False])
def test_the_same_as_pefts_own_conversion(tmp_path: Path, as_documented: bool) -> None:
    """save_pretrained with path_initial_model_for_weight_conversion; peft sets the first adapter's init to true for it."""
    model = trained(tmp_path, "pissa", as_documented=as_documented)
    convert(tmp_path / "adapter", tmp_path / "ours", initial=tmp_path / "first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    (ours, config), (theirs, stated) = read_adapter(tmp_path / "ours"), read_adapter(tmp_path / "theirs")
    assert {key: raw(tensor) for key, tensor in ours.items()} == {key: raw(tensor) for key, tensor in theirs.items()}
    kept = ("r", "lora_alpha", "use_rslora", "init_lora_weights")
    assert [config[name] for name in kept] == [stated[name] for name in kept] == [8, 12, False, True]


@WARNINGS
def test_converted_and_resized(tmp_path: Path) -> None:
    """Twice the rank, or through the core of r × r with nothing lost; each merges to the same and says of its error what it is."""
    model = trained(tmp_path, "pissa", step=0.05)
    first = {"initial": tmp_path / "first"}
    convert(tmp_path / "adapter", tmp_path / "converted", **first)  # type: ignore[arg-type]
    receipt = resize(tmp_path / "adapter", tmp_path / "resized", energy=1.0, **first)  # type: ignore[arg-type]
    rescale(tmp_path / "adapter", tmp_path / "rescaled", bake=True, **first)  # type: ignore[arg-type]
    convert(tmp_path / "adapter", tmp_path / "lora", kind="lora", base=tmp_path / "base", rank=8)
    assert {row["rank"] for row in receipt["tensors"]} == {8} and max(row["error"] for row in receipt["tensors"]) < 1e-6
    assert [row["role"] for row in receipt["inputs"]] == ["adapter", "adapter", "initial", "initial"]
    expected = forward(model)
    for name in ("converted", "resized", "rescaled", "lora"):
        merge(tmp_path / "base", tmp_path / name, tmp_path / f"out-{name}")
        assert apart(merged(tmp_path, f"out-{name}"), expected) <= 1e-5, name


@WARNINGS
def test_factors_of_different_dtypes(tmp_path: Path) -> None:
    trained(tmp_path, "pissa")
    tensors, config = read_adapter(tmp_path / "first")
    write_adapter(tmp_path / "narrow", {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}, config)
    convert(tmp_path / "adapter", tmp_path / "out", initial=tmp_path / "narrow")
    joined, last = read_adapter(tmp_path / "out")[0], read_adapter(tmp_path / "adapter")[0]
    for key, value in joined.items():
        axis, sign = (0, 1) if "lora_A" in key else (1, -1)
        assert torch.equal(value, torch.cat([last[key], sign * tensors[key].to(torch.bfloat16).float()], dim=axis))


@WARNINGS
def test_the_whole_way_round(tmp_path: Path) -> None:
    """Receipt, record, verify, unmerge: the first adapter is an input like the other."""
    trained(tmp_path, "corda", **INITS["corda"])
    first = str(tmp_path / "first")
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", initial=first, reversible=True)
    assert receipt["arguments"]["initial"] == first
    rows = {row["path"]: row["role"] for row in receipt["inputs"]}
    assert [role for path, role in rows.items() if path.startswith(first)] == ["initial", "initial"]
    assert verify(tmp_path / "out", base=tmp_path / "base", adapters=tmp_path / "adapter")["ok"]
    unmerge(tmp_path / "out", tmp_path / "undone")
    base, undone = read_checkpoint(tmp_path / "base"), read_checkpoint(tmp_path / "undone")
    assert all(raw(base[name]) == raw(undone[name]) for name in base)
    tensors, config = read_adapter(tmp_path / "first")
    write_adapter(tmp_path / "first", {key: tensor + 1 for key, tensor in tensors.items()}, config)
    with pytest.raises(LoratoolsError, match=r"not the adapter that was merged: found other bytes in .*first/adapter_model\.safetensors"):
        unmerge(tmp_path / "out", tmp_path / "again")


@WARNINGS
def test_a_record_of_what_the_base_tells(tmp_path: Path) -> None:
    trained(tmp_path, "pissa")
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", reversible=True)
    assert receipt["unmerge"]["share"] > 0.5
    unmerge(tmp_path / "out", tmp_path / "undone")
    base, undone = read_checkpoint(tmp_path / "base"), read_checkpoint(tmp_path / "undone")
    assert all(raw(base[name]) == raw(undone[name]) for name in base)
    assert verify(tmp_path / "out", base=tmp_path / "base", adapters=tmp_path / "adapter")["max_ulp"] == 0
    kinds = inspect(tmp_path / "adapter", base=tmp_path / "base")["kinds"]
    assert kinds == {"pissa": 3} and inspect(tmp_path / "adapter", initial=tmp_path / "first")["kinds"] == {"lora": 3}


@WARNINGS
def test_operations_on_adapters_alone_say_what_they_need(tmp_path: Path) -> None:
    trained(tmp_path, "pissa")
    for work in (
        lambda out: resize(tmp_path / "adapter", out, rank=2),
        lambda out: rescale(tmp_path / "adapter", out, alpha=3.0),
        lambda out: convert(tmp_path / "adapter", out, format="mlx"),
        lambda out: combine([tmp_path / "adapter", tmp_path / "adapter"], out),
    ):
        with pytest.raises(LoratoolsError):
            work(tmp_path / "out")
    needed = "give the adapter as it was initialised with --initial"
    with pytest.raises(LoratoolsError, match=rf"up\.weight: a PiSSA delta has no LoRA to work on; {needed}"):
        resize(tmp_path / "adapter", tmp_path / "out", rank=2)
    convert(tmp_path / "adapter", tmp_path / "own.safetensors", format="loratools")
    merge(tmp_path / "base", tmp_path / "own.safetensors", tmp_path / "merged")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "expected")
    assert raw(read_checkpoint(tmp_path / "merged")["up.weight"]) == raw(read_checkpoint(tmp_path / "expected")["up.weight"])


@WARNINGS
def test_initial_belongs_to_one_file(tmp_path: Path) -> None:
    trained(tmp_path, "pissa")
    first = tmp_path / "first"
    with pytest.raises(OptionError, match="--initial belongs to one adapter's file: found 2 adapters; convert that one first"):
        merge(tmp_path / "base", [tmp_path / "adapter", tmp_path / "first"], tmp_path / "out", initial=first)
    with pytest.raises(OptionError, match="found one in memory"):
        merge(tmp_path / "base", load(tmp_path / "adapter"), tmp_path / "out", initial=first)
    write_adapter(tmp_path / "loha", {"base_model.model.up.hada_w1_a": torch.ones(2, 2)}, {"peft_type": "LOHA"})
    with pytest.raises(OptionError, match="--initial is for peft's LoRA: found LOHA"):
        merge(tmp_path / "base", tmp_path / "loha", tmp_path / "out", initial=first)
    with pytest.raises(OptionError, match="--initial is for adapters, and this is a checkpoint"):
        inspect(tmp_path / "base", initial=first)
    from safetensors.torch import save_file

    save_file({"up.lora_A": torch.ones(2, 24), "up.lora_B": torch.ones(40, 2)}, tmp_path / "loralib.safetensors")
    with pytest.raises(OptionError, match="--initial is for peft's LoRA: found loralib"):
        merge(tmp_path / "base", tmp_path / "loralib.safetensors", tmp_path / "out", initial=first, alpha_in=2.0)
    with pytest.raises(LoratoolsError, match="no such file or folder"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", initial=tmp_path / "nowhere")


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
UP = "base_model.model.up.lora_"
FIRST: dict[str, tuple[Change, str]] = {
    "a weight missing": (lambda t, c: [t.pop(f"{UP}{side}.weight") for side in "AB"], r"up\.weight: --initial has no LoRA on this weight"),
    "a weight more": (
        lambda t, c: (
            t.update({f"{UP.replace('up', 'more')}{side}.weight": t[f"{UP}{side}.weight"] for side in "AB"}),
            c["target_modules"].append("more"),
        ),
        r"more\.weight: --initial has a LoRA on this weight, the adapter has none",
    ),
    "half a pair": (lambda t, c: t.pop(f"{UP}A.weight"), "has no lora_A beside it"),
    "a stray": (lambda t, c: t.update({"base_model.model.up.other": torch.ones(2)}), "neither a tensor of the method"),
    "another rank": (
        lambda t, c: (t.update({f"{UP}A.weight": torch.ones(3, 24), f"{UP}B.weight": torch.ones(40, 3)}), c.update(rank_pattern={"up": 3})),
        r"up\.weight: --initial has factors of another shape: found A \[3, 24\], B \[40, 3\], expected A \[4, 24\], B \[40, 4\]",
    ),
    "another alpha": (lambda t, c: c.update(lora_alpha=7), r"--initial has another scaling: found 1.75, expected 1.5"),
    "another alpha of one": (lambda t, c: c.update(alpha_pattern={"up": 7}), r"up\.weight: --initial has another scaling"),
    "rslora": (lambda t, c: c.update(use_rslora=True), "--initial has another scaling"),
    "another beginning": (
        lambda t, c: c.update(init_lora_weights="olora"), "--initial was initialised in another way: found olora, expected pissa"
    ),
    "a plain beginning": (
        lambda t, c: c.update(init_lora_weights="gaussian"), "--initial is for adapters whose initialisation changed the base"
    ),
    "zero": (lambda t, c: t[f"{UP}B.weight"].zero_(), r"up\.weight: --initial changes nothing here"),
    "no LoRA": (lambda t, c: c.update(peft_type="LOHA"), "--initial is no LoRA of peft's: found LOHA, expected LORA"),
    "an unknown setting": (lambda t, c: c.update(a_new_setting=1), "a_new_setting, which this version does not know"),
}  # fmt: skip


@WARNINGS
@pytest.mark.parametrize("change", FIRST)
def test_a_beginning_that_does_not_fit(tmp_path: Path, change: str) -> None:
    trained(tmp_path, "pissa")
    tensors, config = read_adapter(tmp_path / "first")
    FIRST[change][0](tensors, config)
    write_adapter(tmp_path / "other", tensors, config)
    with pytest.raises(LoratoolsError, match=FIRST[change][1]) as caught:
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", initial=tmp_path / "other")
    assert "other/adapter_model.safetensors" in str(caught.value) and not (tmp_path / "out").exists()


@WARNINGS
def test_the_adapter_itself_is_no_beginning(tmp_path: Path) -> None:
    trained(tmp_path, "pissa")
    with pytest.raises(LoratoolsError, match="--initial holds the same factors: nothing was trained, or it is the same adapter"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", initial=tmp_path / "adapter")


@WARNINGS
def test_true_with_a_beginning_is_the_users_word(tmp_path: Path) -> None:
    """peft's documentation sets init to true before the first save, and the last one may have it still: then only --initial tells."""
    model = trained(tmp_path, "olora")
    for name in ("first", "adapter"):
        tensors, config = read_adapter(tmp_path / name)
        write_adapter(tmp_path / name, tensors, config | {"init_lora_weights": True})
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", initial=tmp_path / "first")
    assert apart(merged(tmp_path), forward(model)) <= 1e-5


@WARNINGS
def test_what_else_it_holds_is_named(tmp_path: Path) -> None:
    model = trained(tmp_path, "pissa", target_modules=["up", "square"], modules_to_save=["down"])
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", initial=tmp_path / "first")
    assert any("not needed of --initial" in note and "down.weight" in note for note in receipt["notes"])
    assert apart(merged(tmp_path), forward(model)) <= 1e-5


@WARNINGS
def test_layers_that_peft_does_not_begin_so(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", {"conv.weight": torch.randn(4, 3, 2)})
    tensors = {"base_model.model.conv.lora_A.weight": torch.ones(2, 3, 2), "base_model.model.conv.lora_B.weight": torch.ones(4, 2, 1)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["conv"], "init_lora_weights": "olora"}
    write_adapter(tmp_path / "adapter", tensors, config)
    write_adapter(tmp_path / "first", {key: tensor + 1 for key, tensor in tensors.items()}, config)
    for initial in (None, tmp_path / "first"):
        with pytest.raises(UnsupportedError, match=r"conv\.weight: peft has no olora for this kind of layer"):
            merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", initial=initial)


@WARNINGS
def test_olora_on_a_square_stored_transposed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", {"h.0.attn.c_proj.weight": torch.randn(8, 8)}, {"model_type": "gpt2"})
    key = "base_model.model.h.0.attn.c_proj.lora_"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["c_proj"], "init_lora_weights": "olora"}
    write_adapter(tmp_path / "adapter", {f"{key}A.weight": torch.randn(2, 8), f"{key}B.weight": torch.randn(8, 2)}, config)
    write_adapter(tmp_path / "first", {f"{key}A.weight": torch.randn(2, 8), f"{key}B.weight": torch.randn(8, 2)}, config)
    for initial in (None, tmp_path / "first"):
        with pytest.raises(UnsupportedError, match=r"c_proj\.weight: peft's OLoRA changes weights stored \(in, out\)"):
            merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", initial=initial)


@WARNINGS
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_any_number_of_threads_gives_the_same_bytes(tmp_path: Path, init: str) -> None:
    trained(tmp_path, init, use_dora=True)
    for count in (1, 3):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / str(count), threads=count)
    one, three = (read_checkpoint(tmp_path / str(count)) for count in (1, 3))
    assert all(raw(one[name]) == raw(three[name]) for name in one)


@WARNINGS
def test_parameters_have_no_such_beginning(tmp_path: Path) -> None:
    tensors = {"base_model.model.experts.lora_A.weight": torch.ones(4, 6), "base_model.model.experts.lora_B.weight": torch.ones(5, 4)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["experts.up"], "init_lora_weights": "pissa"}
    write_adapter(tmp_path / "adapter", tensors, config)
    with pytest.raises(UnsupportedError, match=r"experts\.up: peft has no pissa for this kind of layer"):
        load(tmp_path / "adapter")
