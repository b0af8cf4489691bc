"""From each format to each other and back: one change under names of any model, and all layers of a network that both have."""

from __future__ import annotations

from functools import cache
from itertools import permutations

import pytest
import torch

from loratools.adapter import Adapter
from loratools.errors import LoratoolsError
from loratools.families import Family
from loratools.formats import encode
from loratools.tensorfile import Spec
from tests.formats.arrays import check_written
from tests.formats.cells import reason
from tests.formats.matrix import KINDS as CHANGES
from tests.formats.matrix import LAYERS, Draw, contents
from tests.formats.networks import KINDS, NETWORKS, Network, kinds_of, made, through
from tests.formats.places import adapter_of, options_of, row_of
from tests.formats.test_matrix import WRITTEN

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


def check_near(one: Adapter, other: Adapter, network: Network, unit: float) -> None:
    """ΔW differs by at most 2 units in the last place of the stored dtype, measured by ‖|B||A|‖."""
    assert set(one) == set(other) == set(network.shapes)
    for name, delta in one.items():
        (before, size), (after, _) = made(delta, network.base[name]), made(other[name], network.base[name])
        assert (before - after).norm() <= 2 * unit * size.norm(), name
        assert size.norm() > 0


@pytest.mark.parametrize(("name", "one", "other"), PAIRS)
def test_there_and_back(name: str, one: str, other: str) -> None:
    """What both can say goes from the one to the other and back; where no factors are fused, byte for byte."""
    network, reached = NETWORKS[name], 0
    for kind in kinds_of(network):
        for dtype, unit in DTYPES.items():
            first = start(name, kind, dtype, one)
            if first is None or start(name, kind, dtype, other) is None:
                continue
            middle = through(first, other, network)
            back = through(middle, one, network)
            check_near(first, middle, network, unit)
            check_near(first, back, network, unit)
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
        other = LACKING.get(kind, set()) - ({"mlx", "loralib"} if "single" in name else set())
        assert cannot == (other | whole) & set(network.formats), kind


@pytest.mark.parametrize("one", [format for format in NETWORKS["Llama"].formats])
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
