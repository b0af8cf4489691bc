"""From each format to each other and back: one change under names of any model, and all layers of a network that both have."""

from __future__ import annotations

from functools import cache
from itertools import permutations

import pytest
import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.errors import LoratoolsError
from loratools.formats import encode
from loratools.formats.base import Container
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.formats.arrays import check_written
from tests.formats.cells import reason
from tests.formats.matrix import KINDS as CHANGES
from tests.formats.matrix import LAYERS, Draw, contents
from tests.formats.networks import KINDS, NETWORKS, Network, kinds_of, made, through
from tests.formats.places import adapter_of, options_of, row_of
from tests.formats.test_matrix import WRITTEN
from tests.strategies import randn

DTYPES = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # a unit in the last place of 1
PAIRED = (
    "LoRA", "rsLoRA", "DoRA, a magnitude for each output", "LoHa", "LoKr", "Tucker", "GLoRA of LyCORIS", "outputs turned (LyCORIS' OFT)",
)  # fmt: skip
CASES = [(kind, layer) for kind in PAIRED for layer in CHANGES[kind][1]]


def base_of(layer: str) -> dict[str, Spec]:
    module, leaf, shape, _ = LAYERS[layer]
    return {f"blocks.0.{module}.{leaf}": Spec("F64", shape)}


def alone(adapter: Adapter, format: str, layer: str) -> Adapter:
    """One change under a base's name, written in a format, read and under the base's name again."""
    return row_of(format).decode(encode(adapter, format), options_of(format)).resolve(base_of(layer))


@pytest.mark.parametrize(("one", "other"), list(permutations(WRITTEN, 2)))
def test_one_change_there_and_back(one: str, other: str) -> None:
    """Alphas and factors go untouched, so that all there could be is a scaling's last bits; numbers are drawn from the pair's own seed."""
    reached = 0
    for number, (kind, layer) in enumerate(CASES):
        for place, (dtype, unit) in enumerate(DTYPES.items()):
            seed = 100 * number + place + 1000 * (WRITTEN.index(one) * len(WRITTEN) + WRITTEN.index(other))
            ((name, spec),) = base_of(layer).items()
            adapter = Adapter({name: next(iter(adapter_of(kind, layer, "loratools", Draw(seed, dtype)).values()))})
            try:
                start = alone(adapter, one, layer)
                middle = alone(start, other, layer)
                back = alone(middle, one, layer)
            except LoratoolsError as error:
                reason(error)
                continue
            reached += 1
            assert contents(start[name]) == contents(middle[name]) == contents(back[name])
            (before, size), (after, _) = made(start[name], spec), made(back[name], spec)
            assert (before - after).norm() <= 2 * unit * size.norm()
            assert back[name].facts().get("scaling") == start[name].facts().get("scaling")
    assert reached, "no change that both can say"


# -- all layers of a network

PAIRS = [(name, *pair) for name, network in NETWORKS.items() for pair in permutations(network.formats, 2)]


@cache
def start(name: str, kind: str, dtype: torch.dtype, format: str) -> Adapter | None:
    """The adapter as a format gives it, None where the format cannot say it."""
    network = NETWORKS[name]
    seed = 1000 * list(KINDS).index(kind) + 10_000 * list(DTYPES).index(dtype)
    deltas = KINDS[kind](network, Draw(seed, dtype, scaling=network.scaling))
    try:
        return through(Adapter(deltas, model=network.config), format, network)
    except LoratoolsError as error:
        reason(error)
        return None


def check_near(first: Adapter, others: tuple[Adapter, ...], network: Network, unit: float) -> None:
    """ΔW differs by at most 2 units in the last place of the stored dtype, measured by ‖|B||A|‖."""
    assert all(set(adapter) == set(network.shapes) for adapter in (first, *others))
    for name, delta in first.items():
        before, size = made(delta, network.base[name])
        assert size.norm() > 0
        for other in others:
            assert (before - made(other[name], network.base[name])[0]).norm() <= 2 * unit * size.norm(), name


@pytest.mark.parametrize(("name", "one", "other"), PAIRS)
def test_there_and_back(name: str, one: str, other: str) -> None:
    """What both can say goes from the one to the other and back; where no factors are fused, byte for byte."""
    network, reached = NETWORKS[name], 0
    for kind in kinds_of(network):
        for dtype, unit in list(DTYPES.items())[: 1 if kind == "rsLoRA" else 3]:  # but for its scaling it is LoRA
            first = start(name, kind, dtype, one)
            if first is None or start(name, kind, dtype, other) is None:
                continue
            try:
                middle = through(first, other, network)
                back = through(middle, one, network)
            except LoratoolsError as error:
                assert "one rank" in reason(error) and "gguf" in (one, other) and kind == "LoRA of each slot"
                continue  # GGUF fills up ranks to the largest where only that makes its alpha one
            check_near(first, (middle, back), network, unit)
            if not network.fused:
                assert all(contents(first[key]) == contents(middle[key]) == contents(back[key]) for key in first)
            reached += 1
    assert reached >= len(DTYPES), "no change that both can say"


# what formats cannot say of a network, all else they can
LACKING = {
    "DoRA": {"loralib", "litgpt", "nemo", "gguf", "scratch", "xlabs"},
    "LoRA of each slot": {"mlx", "loralib"},  # one rank, and one alpha, for all
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_each_can_say_of_a_network(name: str) -> None:
    """Of Flux' linear1 XLabs has the first rows alone."""
    network = NETWORKS[name]
    for kind in kinds_of(network):
        cannot = {format for format in network.formats if start(name, kind, torch.float32, format) is None}
        whole = {"xlabs"} if network.first and kind != "LoRA of first rows" else set()
        other = LACKING.get(kind, set()) - ({"nemo"} if name == "Phi-3" else set())  # of one A, its DoRA is of fused weights
        assert cannot == (other | whole) & set(network.formats), kind


@pytest.mark.parametrize("one", NETWORKS["Llama"].formats)
@pytest.mark.parametrize("name", ["Llama", "Phi-3"])
def test_to_tensorrt_llm(name: str, one: str) -> None:
    """Its B is scaling·B rounded once: at most half a unit in the last place of each element off; of gate and up fused the halves swap."""
    network = NETWORKS[name]
    for kind in kinds_of(network):
        for dtype, unit in DTYPES.items():
            first = start(name, kind, dtype, one)
            if first is None or kind == "DoRA":
                continue
            for key, (B, A) in check_written(first, encode(first, "trtllm")).items():
                ΔW, size = made(first[key], network.base[key])
                assert (B.double() @ A.double() - ΔW).norm() <= 2 * unit * size.norm(), key


# -- files whose weights are fused, of models whose weights are not

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "hidden_size": 8}
SELF, MLP = "model.layers.0.self_attn.{}_proj.weight", "model.layers.0.mlp.{}_proj.weight"


def grouped() -> tuple[Container, dict[str, Tensor]]:
    """A NeMo file of fused weights, whose slots share A, and ΔW by the names of a Llama: rows by group, its q, its k, its v."""
    tensors = {
        "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight": randn(2, 8, seed=1),
        "decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight": randn(16, 2, seed=2),
        "decoder.layers.0.mlp.linear_fc1.adapter.linear_in.weight": randn(2, 8, seed=3),
        "decoder.layers.0.mlp.linear_fc1.adapter.linear_out.weight": randn(24, 2, seed=4),
    }
    A, B, C, D = (tensor.double() for tensor in tensors.values())
    qkv, halves = 1.5 * B @ A, 1.5 * D @ C
    rows = {"q": [0, 1, 2, 3, 8, 9, 10, 11], "k": [4, 5, 12, 13], "v": [6, 7, 14, 15]}
    expected = {SELF.format(slot): qkv[rows[slot]] for slot in "qkv"}
    expected |= {MLP.format("gate"): halves[:12], MLP.format("up"): halves[12:]}
    beside = {"run_config.yaml": {"peft": {"dim": 2, "alpha": 3}}, "config.json": {"model_type": "llama", **HEADS}}
    return Container({name: to_ref(tensor) for name, tensor in tensors.items()}, beside=beside), expected


def stacked_rows(count: int) -> tuple[Container, dict[str, Tensor]]:
    """A litgpt file of q, k and v, or of q and v alone, each with an A of its own, and ΔW by the names of a Llama."""
    on = "qkv" if count == 3 else "qv"
    sizes = {"q": 8, "k": 4, "v": 4}
    As, Bs = {slot: randn(2, 8, seed=5 + ord(slot)) for slot in on}, {slot: randn(sizes[slot], 2, seed=ord(slot)) for slot in on}
    root = "transformer.h.0.attn.qkv"
    tensors = {f"{root}.lora_A": torch.cat(list(As.values())), f"{root}.lora_B": torch.cat(list(Bs.values()))}
    hyper = {"lora_r": 2, "lora_alpha": 3} | {f"lora_{word}": word[0] in on for word in ("query", "key", "value")}
    model = {"name": "Llama-2-7b-hf", "n_head": 4, "n_query_groups": 2, "head_size": 2}
    found = Container(
        {name: to_ref(tensor) for name, tensor in tensors.items()}, beside={"hyperparameters.yaml": hyper, "model_config.yaml": model}
    )
    return found, {SELF.format(slot): 1.5 * Bs[slot].double() @ As[slot].double() for slot in on}


FUSED = {"nemo": grouped, "litgpt": lambda: stacked_rows(3), "litgpt, q and v": lambda: stacked_rows(2)}


@pytest.mark.parametrize("other", NETWORKS["Llama"].formats)
@pytest.mark.parametrize("source", FUSED)
def test_fused_files_of_separate_weights(source: str, other: str) -> None:
    """By float64 algebra on the file's own numbers."""
    container, expected = FUSED[source]()
    network = Network({name: tuple(found.shape) for name, found in expected.items()}, (), {"model_type": "llama", **HEADS})
    first = row_of(source.partition(",")[0]).decode(container)
    for adapter in (first, through(first, other, network)):
        assert set(adapter) == set(expected)
        for name, ΔW in expected.items():
            found, size = made(adapter[name], network.base[name])
            assert (found - ΔW).norm() <= 2 * DTYPES[torch.float32] * size.norm(), name
