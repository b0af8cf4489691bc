"""Where another tool is known to differ from what an adapter means: each difference reproduced, its size measured, ours beside it.

A test here is one row of spec/known-differences.md. It returns how large the other tool's error is, which the row states; that
loratools gives what is right, or says by name what it would have to guess, is asserted within.

python tests/interop/test_known_differences.py     writes the document's table anew
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils import merge_utils
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from loratools import combine, compare, load, merge
from loratools.adapter import Adapter
from loratools.changes import Changes
from loratools.deltas.base import Additive
from loratools.deltas.loha import LoHa
from loratools.deltas.lokr import LoKr
from loratools.errors import AmbiguousError, FormatError, MatchError, NonFiniteError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.files import peft_config, read_adapter, read_checkpoint, write_adapter, write_checkpoint

DOCUMENT = Path(__file__).parents[2] / "spec" / "known-differences.md"
BEGIN, END = "<!-- table: written by tests/interop/test_known_differences.py -->\n", "<!-- end of table -->\n"
PEFT, LYCORIS = "peft 0.21.2", "lycoris-lora 4.1.3"
FULL = 100  # a rank that no matrix here has
pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of much, and of none of these


@dataclass(frozen=True)
class Difference:
    """A row: the tool and its version, what it does, what is right, the size of its error and what that is of, and the test."""

    tool: str
    does: str
    right: str
    size: float
    of: str
    test: str


DIFFERENCES: list[Difference] = []


def difference(tool: str, *, does: str, right: str, size: float, of: str) -> Callable[[Callable[..., float]], Callable[..., None]]:
    """A test whose result is the size of the difference, to two digits, as the document states it."""

    def decorate(test: Callable[..., float]) -> Callable[..., None]:
        DIFFERENCES.append(Difference(tool, does, right, size, of, test.__name__))

        @functools.wraps(test)
        def run(*args: Any, **words: Any) -> None:
            measured = test(*args, **words)
            assert float(f"{measured:.2g}") == size, f"{test.__name__}: the difference is {measured:.3g}, the row says {size:g}"

        run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
        return run

    return decorate


# -- what the rows need


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 14), nn.Linear(14, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


@pytest.fixture(autouse=True)
def same_numbers() -> Iterator[None]:
    """The same network and factors in every run."""
    torch.manual_seed(0)
    yield


def network(folder: Path, dtype: torch.dtype = torch.float32) -> Net:
    """A network, its weights written to `base` in the folder."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    write_checkpoint(folder / "base", net.state_dict())
    return net


def wrapped(net: nn.Module, *ranks: int, seed: int = 1, **config: Any) -> peft.PeftModel:
    """The network under adapters `a`, `b`, … of these ranks, everything that trains random."""
    configs = [peft.LoraConfig(r=rank, **{"lora_alpha": 6, "target_modules": ["up", "down"], **config}) for rank in ranks]
    model = peft.get_peft_model(net, configs[0], "a")
    for name, other in zip("bcd", configs[1:], strict=False):
        model.add_adapter(name, other)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise)
            elif "lora_" in name:
                parameter.copy_(0.3 * noise)
    return model


def layer(model: Any, name: str = "up") -> Any:
    return getattr(model.base_model.model, name)


def change(model: Any, adapter: str = "a", name: str = "up") -> Tensor:
    """ΔW of an adapter's LoRA by the paper's formula, in float64."""
    found, config = layer(model, name), model.peft_config[adapter]
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return scaling * found.lora_B[adapter].weight.double() @ found.lora_A[adapter].weight.double()


def dora_change(model: Any, adapter: str = "a", name: str = "up") -> Tensor:
    """W′ − W of an adapter's DoRA, in float64."""
    found = layer(model, name)
    W = found.base_layer.weight.double()
    V = W + change(model, adapter, name)
    return found.lora_magnitude_vector[adapter].weight.double().unsqueeze(1) * V / V.norm(dim=1, keepdim=True) - W


def ours(folder: Path, name: str = "up") -> Tensor:
    """ΔW of an adapter that loratools wrote."""
    tensors, config = read_adapter(folder)
    A, B = (tensors[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    return config["lora_alpha"] / config["r"] * B @ A


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


EXACT = 1e-6  # of the change: factors written in float32


# -- add_weighted_adapter


@difference(
    PEFT, does="`add_weighted_adapter` keeps `use_rslora` for a result that it computed for alpha / r: too large by √r",
    right="Σ wᵢ·ΔWᵢ", size=1.0, of="‖Σ wᵢ·ΔWᵢ‖, at rank 4",
)  # fmt: skip
def test_rslora_is_scaled_twice(tmp_path: Path) -> float:
    model = wrapped(network(tmp_path), 4, 4, use_rslora=True)
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "sum", "svd", svd_rank=4)
    right = 0.7 * change(model, "a") + 0.4 * change(model, "b")
    combine([f"{tmp_path}/a:0.7", f"{tmp_path}/b:0.4"], tmp_path / "out")
    assert apart(ours(tmp_path / "out"), right) < EXACT
    # the truncation to rank 4 is taken out: what is left is the factor
    U, S, Vh = torch.linalg.svd(right, full_matrices=False)
    return apart(layer(model).get_delta_weight("sum"), (U[:, :4] * S[:4]) @ Vh[:4])


@difference(
    PEFT, does="`add_weighted_adapter` of type `linear` adds up the As and the Bs apart: cross terms BᵢAⱼ",
    right="Σ wᵢ·ΔWᵢ", size=0.81, of="‖Σ wᵢ·ΔWᵢ‖, at 0.7 and 0.3",
)  # fmt: skip
def test_linear_has_cross_terms(tmp_path: Path) -> float:
    model = wrapped(network(tmp_path), 4, 4)
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "sum", "linear")
    right = 0.7 * change(model, "a") + 0.3 * change(model, "b")
    combine([f"{tmp_path}/a:0.7", f"{tmp_path}/b:0.3"], tmp_path / "out")
    assert apart(ours(tmp_path / "out"), right) < EXACT
    return apart(layer(model).get_delta_weight("sum"), right)


@difference(
    PEFT, does="`add_weighted_adapter` of type `ties` (and `dare_linear`, `dare_ties`, `magnitude_prune`) prunes and votes on A and on B",
    right="the method on the ΔWᵢ, as the paper has it", size=1.0, of="‖TIES of the ΔWᵢ‖",
)  # fmt: skip
def test_ties_of_the_factors(tmp_path: Path) -> float:
    model = wrapped(network(tmp_path), 4, 4)
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "ties", density=0.5)
    right = merge_utils.ties([change(model, "a"), change(model, "b")], torch.ones(2).double(), 0.5)
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method="ties", density=0.5, rank=10)
    assert apart(ours(tmp_path / "out"), right) < EXACT
    return apart(layer(model).get_delta_weight("sum"), right)


@difference(
    PEFT, does="`add_weighted_adapter` of one adapter is `linear` whatever type is asked for: nothing is pruned",
    right="the method of one adapter", size=0.64, of="‖the pruned ΔW‖, at density 0.2",
)  # fmt: skip
def test_one_adapter_is_never_pruned(tmp_path: Path) -> float:
    model = wrapped(network(tmp_path), 4)
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["a"], [1.0], "sum", "magnitude_prune_svd", density=0.2)
    right = merge_utils.prune(change(model), 0.2, "magnitude")
    combine([tmp_path / "a"], tmp_path / "out", method="magnitude-prune", density=0.2, rank=10)
    assert apart(ours(tmp_path / "out"), right) < EXACT
    assert apart(layer(model).get_delta_weight("sum"), change(model)) < EXACT
    return apart(layer(model).get_delta_weight("sum"), right)


@difference(
    PEFT, does="`add_weighted_adapter` of a DoRA starts from fresh magnitudes: those that were trained are gone",
    right="Σ wᵢ·(applyᵢ(W) − W)", size=0.21, of="‖W′ − W‖, of one adapter at weight 1",
)  # fmt: skip
def test_a_sum_forgets_doras_magnitudes(tmp_path: Path) -> float:
    model = wrapped(network(tmp_path), 4, use_dora=True)
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["a"], [1.0], "sum")
    right = dora_change(model)
    combine([f"{tmp_path}/a:0.5", f"{tmp_path}/a:0.5"], tmp_path / "out", base=tmp_path / "base", rank=10)
    assert apart(ours(tmp_path / "out"), right) < EXACT
    return apart(dora_change(model, "sum"), right)


@difference(
    PEFT, does="`add_weighted_adapter` leaves the biases of lora_B (`lora_bias`) at zero",
    right="Σ wᵢ·sᵢ·bᵢ on the bias", size=1.0, of="the change of the bias",
)  # fmt: skip
def test_a_sum_forgets_lora_bias(tmp_path: Path) -> float:
    model = wrapped(network(tmp_path), 4, 4, lora_bias=True)
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "sum", "cat")
    biases = {name: found.bias.double() for name, found in layer(model).lora_B.items()}
    right = 6 / 4 * (0.7 * biases["a"] + 0.4 * biases["b"])
    combine([f"{tmp_path}/a:0.7", f"{tmp_path}/b:0.4"], tmp_path / "out")
    tensors, config = read_adapter(tmp_path / "out")
    assert apart(config["lora_alpha"] / config["r"] * tensors["base_model.model.up.lora_B.bias"], right) < EXACT
    return apart(biases["sum"] * 1.0, right)


# -- conversion and analysis


@difference(
    PEFT, does="`convert_to_lora` of a DoRA adapter takes B·A alone, without the magnitudes and without a warning",
    right="the best LoRA of W′ − W", size=0.94, of="‖W′ − W‖, at full rank",
)  # fmt: skip
def test_conversion_drops_doras_magnitudes(tmp_path: Path) -> float:
    model = wrapped(network(tmp_path), 4, use_dora=True)
    model.save_pretrained(tmp_path)
    config, tensors = convert_to_lora(model, rank=10, adapter_name="a")
    prefix = next(key for key in tensors if "up.lora_A" in key).partition("up.")[0]
    scaling = config.lora_alpha / config.r
    theirs = scaling * tensors[f"{prefix}up.lora_B.weight"].double() @ tensors[f"{prefix}up.lora_A.weight"].double()
    right = dora_change(model)
    combine([f"{tmp_path}/a:0.5", f"{tmp_path}/a:0.5"], tmp_path / "out", base=tmp_path / "base", rank=10)
    assert apart(ours(tmp_path / "out"), right) < EXACT
    return apart(theirs, right)


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(10, 14), nn.Sequential(nn.Linear(14, 14), nn.ReLU(), nn.Linear(14, 14))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x))


@difference(
    PEFT, does="`save_as_lora` writes the tensors of a saved module of several under one name each: `head.0.weight`, `head.2.weight` "
    "become `head.weight`",
    right="every saved tensor under its own name", size=0.5, of="the saved tensors, which are lost",
)  # fmt: skip
def test_saved_modules_collapse(tmp_path: Path) -> float:
    model = wrapped(Headed(), 4, target_modules=["up"], modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    save_as_lora(tmp_path / "theirs", model, rank=4, adapter_name="a")
    tensors, _ = read_adapter(tmp_path / "theirs")
    saved = [key for key in read_adapter(tmp_path / "a")[0] if "head" in key]
    combine([tmp_path / "a"], tmp_path / "out")
    assert {name for name in load(tmp_path / "out") if "head" in name} == {key.removeprefix("base_model.model.") for key in saved}
    return 1 - len([key for key in tensors if "head" in key]) / len(saved)


@difference(
    PEFT, does="`reduce_intruder_dimension` looks at W + ΔV of a DoRA, not at the W′ that its magnitudes make",
    right="the singular vectors of W′", size=0.12, of="1, a cosine: by so much that of the leading direction is off",
)  # fmt: skip
def test_intruders_of_a_dora(tmp_path: Path) -> float:
    net = network(tmp_path)
    model = wrapped(net, 4, use_dora=True)
    with torch.no_grad():
        U = torch.linalg.svd(layer(model).base_layer.weight, full_matrices=False)[0]
        apart_from_all = int(U.abs().amax(dim=1).argmin())  # an output channel that is no direction of W
        layer(model).lora_magnitude_vector["a"].weight[apart_from_all] *= 40  # and leads W′
    model.save_pretrained(tmp_path)
    said: list[str] = []
    found = compare(tmp_path / "a", tmp_path / "a", base=tmp_path / "base", top_k=1)["intruders"]["modules"]
    row = next(row for row in found if row["name"] == "up.weight")
    W = layer(model).base_layer.weight.double()
    vectors = [torch.linalg.svd(X, full_matrices=False)[0] for X in (W, W + dora_change(model), W + change(model))]
    right, theirs = (float((U[:, 0] @ vectors[0]).abs().max()) for U in vectors[1:])
    reduce_intruder_dimension(model, "a", top_k=1, threshold_epsilon=(theirs + right) / 2, logging_sink=said.append)
    assert row["cosines"] == pytest.approx([right], abs=1e-6)
    assert ("Intruders" in next(line for line in said if "up:" in line)) == (theirs < right), "it sees the other vector"
    return abs(theirs - right)


# -- merging


@difference(
    PEFT, does="merging into a base whose layers are repeated (`layer_replication`) goes through: its guard asks the wrong dictionary, and "
    "the repeated layer's one tensor gets every copy's ΔW",
    right="an error: one tensor cannot hold two changes", size=1.3, of="‖ΔW‖ of a repeated layer",
)  # fmt: skip
def test_replicated_layers_are_merged(tmp_path: Path) -> float:
    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=17
    )
    model = wrapped(LlamaForCausalLM(config), 2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    projection = model.base_model.model.model.layers[1].self_attn.q_proj
    W, ΔW = projection.base_layer.weight.detach().clone(), projection.get_delta_weight("a").detach()
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().model.layers[1].self_attn.q_proj.weight
    with pytest.raises(UnsupportedError, match="layer_replication: repeats layers, so one base weight would need several values"):
        load(tmp_path / "a")
    return apart(merged.detach() - W, ΔW.double())


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@difference(
    PEFT, does="merging a Conv3d of kernel 1 × 1 × 1 is a RuntimeError: it is taken for a matrix in the wrong axes",
    right="(B·A) in the kernel's shape, as its own forward has it", size=1.0, of="‖ΔW‖: nothing is merged",
)  # fmt: skip
def test_pointwise_conv3d_cannot_be_merged(tmp_path: Path) -> float:
    net = Point()
    write_checkpoint(tmp_path / "base", net.state_dict())
    model = wrapped(net, 2, target_modules=["conv"])
    model.save_pretrained(tmp_path)
    merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", dtype="float64")
    x = torch.randn(2, 4, 3, 3, 3).double()
    state = read_checkpoint(tmp_path / "out")
    right = model.double()(x)
    assert apart(nn.functional.conv3d(x, state["conv.weight"], state["conv.bias"]), right) < EXACT
    with pytest.raises(RuntimeError, match="must match the size"):
        model.merge_and_unload()
    return 1.0


@difference(
    PEFT, does="`merge_and_unload` writes inf where a float16 weight overflows, and goes on",
    right="an error that names the tensor", size=1.0, of="the weights of a row that overflows",
)  # fmt: skip
def test_overflow_is_written(tmp_path: Path) -> float:
    net = network(tmp_path, torch.float16)
    model = wrapped(net, 2)
    with torch.no_grad():
        layer(model).lora_B["a"].weight[3] = 6e4
        layer(model).lora_A["a"].weight[:] = 3
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().up.weight
    with pytest.raises(NonFiniteError, match=r"up\.weight: would not be finite in float16"):
        merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    return float(merged[3].isinf().double().mean())


@difference(
    PEFT, does="`merge_and_unload` into bfloat16 rounds ΔW before it is added, and the sum again",
    right="one rounding of W + ΔW", size=0.33, of="the weights, which are another than the nearest",
)  # fmt: skip
def test_bfloat16_is_rounded_twice(tmp_path: Path) -> float:
    net = network(tmp_path, torch.bfloat16)
    model = wrapped(net, 4)
    for found in (layer(model, "up"), layer(model, "down")):  # factors of bfloat16, as many files have them
        found.lora_A["a"].to(torch.bfloat16)
        found.lora_B["a"].to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    right = (layer(model).base_layer.weight.double() + change(model)).to(torch.bfloat16)
    merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert torch.equal(read_checkpoint(tmp_path / "out")["up.weight"], right)
    return float((model.merge_and_unload().up.weight != right).double().mean())


@difference(
    PEFT, does="of several adapters merged or active together, a DoRA that comes later takes its norms of what the earlier ones made",
    right="W + Σ (applyᵢ(W) − W), in any order", size=0.36, of="‖Σ (applyᵢ(W) − W)‖",
)  # fmt: skip
def test_the_order_of_doras_matters(tmp_path: Path) -> float:
    net = network(tmp_path)
    W = net.up.weight.detach().double().clone()
    model = wrapped(net, 4, 4, use_dora=True)
    model.save_pretrained(tmp_path)
    right = dora_change(model, "a") + dora_change(model, "b")
    merge(tmp_path / "base", [tmp_path / "b", tmp_path / "a"], tmp_path / "out", dtype="float64")
    assert apart(read_checkpoint(tmp_path / "out")["up.weight"] - W, right) < EXACT
    model.base_model.set_adapter(["a", "b"])
    model.merge_adapter(["a", "b"])
    return apart(layer(model).base_layer.weight.detach().double() - W, right)


# -- loading


def stored(folder: Path, *, config: dict[str, Any] | None = None, **more: Tensor) -> tuple[Path, Tensor]:
    """An adapter of rank 2 on `up`, with more tensors under their keys; its ΔW at scaling 1."""
    A, B = torch.randn(2, 10), torch.randn(14, 2)
    tensors = {"base_model.model.up.lora_A.weight": A, "base_model.model.up.lora_B.weight": B, **more}
    stated = peft_config(lora_alpha=2, target_modules=["up"]) if config is None else config
    return write_adapter(folder / "adapter", tensors, stated), B.double() @ A.double()


def opened(net: nn.Module, folder: Path) -> Any:
    """peft's own loading; what it warns of is not what these rows are about."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(net, folder)
    return model, [str(warning.message) for warning in said]


@difference(
    PEFT, does="factors of a module that `target_modules` does not name are dropped on loading, without a word",
    right="an error that names tensor and module", size=1.0, of="‖ΔW‖ of that module",
)  # fmt: skip
def test_factors_of_other_modules_are_dropped(tmp_path: Path) -> float:
    net = network(tmp_path)
    x = torch.randn(5, 14)
    before = net.down(x)
    more = {"base_model.model.down.lora_A.weight": torch.randn(2, 14), "base_model.model.down.lora_B.weight": torch.randn(12, 2)}
    folder, _ = stored(tmp_path, **more)
    model, said = opened(net, folder)
    assert not said
    with pytest.raises(MatchError, match=r"down\.lora_A\.weight: the config does not target this module"):
        load(folder)
    lost = x @ more["base_model.model.down.lora_A.weight"].T @ more["base_model.model.down.lora_B.weight"].T
    right = before + lost
    return float((layer(model, "down")(x) - right).norm() / lost.norm())


@difference(
    PEFT, does="a `lora_B.bias` without `lora_bias` in the config, as mergekit-extract-lora writes it, is dropped without a word",
    right="an error that names the tensor", size=1.0, of="the change of the bias",
)  # fmt: skip
def test_a_bias_without_its_flag_is_dropped(tmp_path: Path) -> float:
    net = network(tmp_path)
    bias = torch.randn(14)
    folder, ΔW = stored(tmp_path, **{"base_model.model.up.lora_B.bias": bias})
    W = net.up.weight.detach().double().clone()
    model, said = opened(net, folder)
    assert not said
    with pytest.raises(FormatError, match=r"lora_B\.bias: lora_B\.bias without lora_bias"):
        load(folder)
    x = torch.randn(5, 10)
    lost = bias.double().expand(5, 14)
    right = x.double() @ (W + ΔW).T + layer(model).base_layer.bias.double() + lost
    return float((layer(model)(x).double() - right).norm() / lost.norm())


@difference(
    PEFT, does="a config without `lora_alpha` is read as 8",
    right="an error: the file does not tell the scale", size=3.0, of="‖ΔW‖, of an adapter trained at alpha 2 and rank 2",
)  # fmt: skip
def test_a_missing_alpha_is_8(tmp_path: Path) -> float:
    config = peft_config(target_modules=["up"])
    del config["lora_alpha"]
    folder, right = stored(tmp_path, config=config)
    model, _ = opened(network(tmp_path), folder)
    with pytest.raises(AmbiguousError, match="lora_alpha is missing, and nothing else tells the scale; give it with --alpha-in A"):
        load(folder)
    combine([folder], tmp_path / "out", alpha_in=2.0)
    assert apart(ours(tmp_path / "out"), right) < EXACT
    return apart(layer(model).get_delta_weight("default"), right)


@difference(
    PEFT, does="any key of the file that is a base tensor's name overwrites that tensor, listed in the config or not",
    right="an error, unless the config says that the module was saved", size=1.0, of="‖W‖ of the tensor, here replaced by zeros",
)  # fmt: skip
def test_stray_tensors_overwrite_the_base(tmp_path: Path) -> float:
    net = network(tmp_path)
    W = net.down.weight.detach().double().clone()
    folder, _ = stored(tmp_path, **{"base_model.model.down.weight": torch.zeros(12, 14)})
    model, said = opened(net, folder)
    assert not said
    with pytest.raises(MatchError, match=r"down\.weight: neither a tensor of the method nor one that the config says was saved"):
        load(folder)
    return apart(layer(model, "down").weight.detach(), W)


@difference(
    PEFT, does="an adapter whose keys lack `base_model.model.` loads as one that changes nothing, with a warning of missing keys",
    right="the names are the base's own: they are taken as they are", size=1.0, of="‖ΔW‖",
)  # fmt: skip
def test_keys_without_the_prefix_change_nothing(tmp_path: Path) -> float:
    net = network(tmp_path)
    W = net.up.weight.detach().double().clone()
    folder, right = stored(tmp_path)
    tensors, config = read_adapter(folder)
    bare = write_adapter(tmp_path / "bare", {key.removeprefix("base_model.model."): value for key, value in tensors.items()}, config)
    model, said = opened(net, bare)
    assert any("missing adapter keys" in text for text in said)
    merge(tmp_path / "base", bare, tmp_path / "out", dtype="float64")
    assert apart(read_checkpoint(tmp_path / "out")["up.weight"] - W, right) < EXACT
    return apart(layer(model).get_delta_weight("default"), right)


# -- LyCORIS


@difference(
    LYCORIS, does="`get_diff_weight`, `merge_to` and `get_merged_weight` of LoHa apply alpha / dim twice",
    right="once, as its forward does", size=0.75, of="‖ΔW‖, at alpha / dim = 1/4",
)  # fmt: skip
def test_lycoris_scales_a_difference_twice(tmp_path: Path) -> float:
    module = LohaModule("x", nn.Linear(10, 14, bias=False), lora_dim=4, alpha=1.0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    x = torch.eye(10)
    right = (module(x) - module.org_forward(x)).T.detach().double()  # its forward, on the unit vectors: ΔW
    refs = {name: to_ref(getattr(module, f"hada_{name}").detach()) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    delta = LoHa(**refs, scale=1.0 / 4, alpha=1.0)
    combine([Adapter(deltas={"up.weight": delta}), Adapter(deltas={"up.weight": delta})], tmp_path / "out")
    assert apart(ours(tmp_path / "out"), 2 * right) < EXACT
    return apart(module.get_diff_weight(1.0)[0].detach(), right)


@difference(
    PEFT, does="LoKr of a Conv1d with a whole w2 multiplies w2 ⊗ w1, in the other order than LyCORIS, whose files it loads",
    right="w1 ⊗ w2, as LyCORIS's forward; of a file that peft trained, what peft computes", size=1.4, of="‖ΔW‖, of LyCORIS's tensors",
)  # fmt: skip
def test_lokr_of_a_conv1d_is_exchanged(tmp_path: Path) -> float:
    conv = nn.Conv1d(6, 8, 3, bias=False)
    module = LokrModule("x", conv, lora_dim=10000, alpha=1.0, factor=2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    x = torch.randn(40, 6, 3)
    theirs, forward = peft.get_peft_model(nn.ModuleDict({"c": nn.Conv1d(6, 8, 3, bias=False)}), lokr_config()), module(x)
    right = torch.linalg.lstsq(x.flatten(1).double(), (forward - conv(x)).flatten(1).double()).solution.T  # ΔW from its forward
    layer_ = theirs.base_model.model["c"]
    with torch.no_grad():
        layer_.lokr_w1["default"].copy_(module.lokr_w1)
        layer_.lokr_w2["default"].copy_(module.lokr_w2)
    refs = {name: to_ref(getattr(module, f"lokr_{name}").detach()) for name in ("w1", "w2")}
    found = {order: dense_of(LoKr(**refs, scale=1.0, exchanged=order), (8, 6, 3)) for order in (False, True)}
    peft_made = layer_.get_delta_weight("default").detach().flatten(1)
    scale = float(peft_made.norm() / found[True].norm())  # alpha / r, which LyCORIS leaves out of two whole factors
    assert apart(found[False], right) < EXACT and apart(scale * found[True], peft_made.double()) < EXACT
    return apart(peft_made / scale, right)


def lokr_config() -> peft.LoKrConfig:
    return peft.LoKrConfig(r=100, alpha=100, target_modules=["c"], decompose_factor=2, init_weights=False)


def dense_of(delta: Additive, shape: tuple[int, ...]) -> Tensor:
    """All of ΔW as (out, in·kernel)."""
    found = Changes([(delta, 1.0)], Spec("F32", shape), None)
    return torch.cat([rows.clone() for rows in found.one(0)])


# -- the document


def table() -> str:
    lines = ["| tool | what it does | what is right, and what loratools does | size of the error | test |", "|---|---|---|---|---|"]
    lines += [f"| {row.tool} | {row.does} | {row.right} | {row.size:g} of {row.of} | `{row.test}` |" for row in DIFFERENCES]
    return "\n".join(lines) + "\n"


def test_the_document_is_the_tests() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.partition(BEGIN)[2].partition(END)[0] == table(), "python tests/interop/test_known_differences.py writes the table anew"
    assert len(DIFFERENCES) >= 10 and len({row.test for row in DIFFERENCES}) == len(DIFFERENCES)


def test_the_versions_are_those_that_run() -> None:
    from importlib.metadata import version

    assert {PEFT, LYCORIS} == {f"peft {version('peft')}", f"lycoris-lora {version('lycoris-lora')}"}


def test_a_row_whose_size_is_wrong_fails() -> None:
    @difference(PEFT, does="", right="", size=0.5, of="")
    def wrong() -> float:
        return 0.52

    DIFFERENCES.pop()
    with pytest.raises(AssertionError, match=r"wrong: the difference is 0\.52, the row says 0\.5"):
        wrong()


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
