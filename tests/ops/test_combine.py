"""combine: the sum against dense float64 algebra and against peft, linearity, what has no sum, and methods there are not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, LoratoolsError, MatchError, OptionError, ShapeError, UnsupportedError
from loratools.formats import load
from loratools.ops.combine import combine
from loratools.ops.merge import merge
from loratools.tensors import read_tensor, to_ref
from tests.files import peft_config, raw, read_checkpoint, write_adapter, write_checkpoint
from tests.ops._lora import adapters, checked, dense, low, rows_of, size

NAME = "h.0.up.weight"
FLOAT64 = 1e-13  # of Σ‖bₖ‖‖aₖ‖: a few hundred units of float64
FLOAT32 = 1e-7  # of ‖ΔW‖: two factors rounded by up to 2⁻²⁴ of each element
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
weights = st.sampled_from([1.0, 0.7, -0.5, 2.0, -1.0, 0.0])


def sums(given: list[tuple[Adapter, float]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Σ wᵢΔWᵢ by name, and what float64 noise is relative to."""
    total: dict[str, Tensor] = {}
    sizes: dict[str, float] = {}
    for adapter, weight in given:
        for name, delta in adapter.items():
            assert isinstance(delta, LowRank)
            total[name] = total.get(name, torch.zeros(())) + weight * dense(delta)
            sizes[name] = sizes.get(name, 0.0) + abs(weight) * size(delta)
    return total, sizes


@settings(max_examples=40)
@given(st.lists(st.tuples(adapters(dtypes=DTYPES), weights), min_size=1, max_size=3), st.sampled_from([None, 1, 3, 20]))
def test_a_sum_is_the_sum(tmp_path_factory: pytest.TempPathFactory, given: list[tuple[Adapter, float]], rank: int | None) -> None:
    out = tmp_path_factory.mktemp("c") / "out"
    receipt = checked(combine(given, out, rank=rank), out)
    found = load(out)
    total, sizes = sums(given)
    assert set(found) == set(total) and receipt["applied"] == receipt["expected"] == sum(len(one) for one, _ in given)
    for name, row in rows_of(receipt).items():
        wanted, noise = total[name], FLOAT64 * sizes[name]
        norm, error = float(wanted.norm()), float((dense(found[name]) - wanted).norm())
        after = found[name]
        assert isinstance(after, LowRank) and after.rank == row["rank"]
        assert row["adapters"] == sum(name in one for one, _ in given)
        assert row["rank_before"] == sum(one[name].rank for one, _ in given if name in one)  # type: ignore[attr-defined]
        best = float(torch.linalg.svdvals(wanted)[after.rank :].norm())
        if rank is None:
            # what a lossless rank may drop is 2⁻²⁷ of ‖ΔW‖
            assert best <= 2.0**-27 * norm + noise
        else:
            assert after.rank <= rank
        widest = 5e-3 if row["adapters"] == 1 and rank is not None else FLOAT32  # a 16-bit adapter alone keeps its dtype
        assert error <= best + widest * norm + noise
        assert row["error"] * norm == pytest.approx(error, rel=1e-4, abs=10 * noise)
        assert row["optimal_error"] * norm <= best + noise


@settings(max_examples=15)
@given(adapters(), adapters(), weights, weights)
def test_it_is_linear(tmp_path_factory: pytest.TempPathFactory, one: Adapter, other: Adapter, v: float, w: float) -> None:
    """2·(v·a + w·b) − v·a − w·b is v·a + w·b."""
    folder = tmp_path_factory.mktemp("l")
    combine([(one, v), (other, w)], folder / "once")
    combine([(load(folder / "once"), 2.0), (one, -v), (other, -w)], folder / "again")
    first, second = load(folder / "once"), load(folder / "again")
    _, sizes = sums([(one, v), (other, w)])
    for name in first:
        assert float((dense(first[name]) - dense(second[name])).norm()) <= 4 * FLOAT32 * sizes[name]


def test_an_adapter_less_itself_is_zero_of_rank_1(tmp_path: Path) -> None:
    given = Adapter(deltas={NAME: low((20, 7), 5, 0)})
    (row,) = combine([given, (given, -1.0)], tmp_path / "out")["tensors"]
    assert row["rank"] == 1
    assert float(dense(load(tmp_path / "out")[NAME]).norm()) <= FLOAT64 * size(low((20, 7), 5, 0))


def test_where_rounding_allows_it_the_sum_is_exact(tmp_path: Path) -> None:
    one, other = low((20, 30), 4, 0, alpha=8.0), low((20, 30), 2, 1, alpha=2.0)
    (row,) = combine([(Adapter(deltas={NAME: one}), 0.5), (Adapter(deltas={NAME: other}), -2.0)], tmp_path / "out")["tensors"]
    assert (row["rank_before"], row["rank"]) == (6, 6)
    found = load(tmp_path / "out")[NAME]
    assert isinstance(found, LowRank)
    assert torch.equal(read_tensor(found.A), torch.cat([read_tensor(one.A), read_tensor(other.A)]))
    assert torch.equal(read_tensor(found.B), torch.cat([read_tensor(one.B), -2 * read_tensor(other.B)], dim=1))


def test_alone_keeps_its_factors(tmp_path: Path) -> None:
    one = low((20, 7), 4, 0, dtype=torch.bfloat16, rslora=True, alpha=3.0)
    receipt = checked(combine([(Adapter(deltas={NAME: one}), -0.7)], tmp_path / "out"), tmp_path / "out")
    found = load(tmp_path / "out")[NAME]
    assert isinstance(found, LowRank) and found.rslora and found.alpha == pytest.approx(2.1)
    assert raw(read_tensor(found.A)) == raw(read_tensor(one.A)) and torch.equal(read_tensor(found.B), -read_tensor(one.B))
    assert receipt["tensors"][0]["error"] == 0


def test_paths_with_weights_are_counted(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    paths = []
    for index, targets in enumerate((["up", "down"], ["up"])):
        shapes = {"up": (20, 7), "down": (7, 20)}
        tensors = {}
        for module in targets:
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, shapes[module][1], generator=generator)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(shapes[module][0], 2, generator=generator)
        config = peft_config(target_modules=targets, base_model_name_or_path=f"some/base{index}")
        paths.append(write_adapter(tmp_path / f"a{index}", tensors, config))
    receipt = checked(combine([f"{paths[0]}:0.7", f"{paths[1]}:-0.5"], tmp_path / "out", sha256=True), tmp_path / "out")
    assert receipt["arguments"]["adapters"] == [f"{paths[0]}:0.7", f"{paths[1]}:-0.5"]
    assert (receipt["expected"], receipt["applied"], len(receipt["tensors"]), len(receipt["inputs"])) == (3, 3, 2, 4)
    assert "1 tensors are in 1 of the 2 adapters, 1 tensors are in 2 of the 2 adapters" in receipt["notes"]
    assert "they name different bases: some/base0, some/base1" in receipt["notes"]
    weights_ = {name: torch.randn(shape, generator=generator) for name, shape in {"up.weight": (20, 7), "down.weight": (7, 20)}.items()}
    base = write_checkpoint(tmp_path / "base", weights_)
    merge(base, [f"{paths[0]}:0.7", f"{paths[1]}:-0.5"], tmp_path / "two", dtype="float64")
    merge(base, tmp_path / "out", tmp_path / "one", dtype="float64")
    one, two = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)  # float32 factors of a ΔW near 5


# -- peft


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 18, bias=False), nn.Linear(18, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_peft_agrees_where_it_is_right(tmp_path: Path, kind: str) -> None:
    """add_weighted_adapter cat is the same sum; svd the same truncation."""

    def config(rank: int, alpha: int) -> peft.LoraConfig:
        return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["up", "down"], init_lora_weights=False)

    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), config(4, 6), "one")
    model.add_adapter("two", config(4 if kind == "cat" else 3, 3))
    model.save_pretrained(tmp_path / "peft")
    rank = {} if kind == "cat" else {"svd_rank": 5}
    model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "sum", combination_type=kind, **rank)
    receipt = combine([f"{tmp_path}/peft/one:0.7", f"{tmp_path}/peft/two:0.4"], tmp_path / "out", rank=None if kind == "cat" else 5)
    assert {row["rank"] for row in receipt["tensors"]} == {8 if kind == "cat" else 5}
    found = load(tmp_path / "out")
    for name in ("up", "down"):
        layer = getattr(model.base_model.model, name)
        theirs = layer.get_delta_weight("sum").double()
        assert torch.allclose(dense(found[f"{name}.weight"]), theirs, atol=2e-6 * float(theirs.norm()))  # peft works in float32


# -- biases, saved tensors, what has no sum


def with_bias(seed: int, bias: bool = True) -> Adapter:
    weight = low((20, 7), 3, seed, alpha=3.0 + seed)
    deltas: dict[str, Delta] = {NAME: weight}
    if bias:
        deltas["h.0.up.bias"] = Full(diff=to_ref(torch.full((20,), 1.0 + seed)), scale=weight.scaling)
    return Adapter(deltas=deltas)


@pytest.mark.parametrize("biases", [(True, True), (True, False), (True,)])
def test_biases_add_up(tmp_path: Path, biases: tuple[bool, ...]) -> None:
    given = [(with_bias(seed, bias), 0.5 - seed) for seed, bias in enumerate(biases)]
    receipt = checked(combine(given, tmp_path / "out"), tmp_path / "out")
    found = load(tmp_path / "out")
    for name in ("h.0.up.bias", NAME):
        wanted = sum(weight * dense(one[name]) for one, weight in given if name in one)
        assert torch.allclose(dense(found[name]), torch.as_tensor(wanted), atol=1e-6 * float(torch.as_tensor(wanted).abs().max()))
    assert receipt["applied"] == sum(len(one) for one, _ in given)
    assert rows_of(receipt)["h.0.up.bias"]["rank"] is None


def saved(value: float, weight: Delta | None = None) -> Adapter:
    deltas: dict[str, Delta] = {"head.weight": Replacement(value=to_ref(torch.full((4, 7), value)))}
    return Adapter(deltas=deltas | {NAME: weight or low((20, 7), 2, int(value))})


@pytest.mark.parametrize(
    "given", [[(saved(1), 1.0), (with_bias(0), 0.3)], [(saved(1), 0.5), (saved(1), 0.5)], [(saved(1), 1.0), (saved(1), 1.0)]]
)
def test_saved_tensors_that_agree(tmp_path: Path, given: list[tuple[Adapter, float]]) -> None:
    checked(combine(given, tmp_path / "out"), tmp_path / "out")
    found = load(tmp_path / "out")["head.weight"]
    assert isinstance(found, Replacement) and bool((read_tensor(found.value) == 1).all())


def dora(seed: int = 0) -> Adapter:
    return Adapter(deltas={NAME: DoRA(direction=low((20, 7), 2, seed), magnitude=to_ref(torch.ones(20, 1)))})


def matrix() -> Adapter:
    return Adapter(deltas={NAME: Full(diff=to_ref(torch.ones(20, 7)))})


def chain() -> Adapter:
    first = Replacement(value=to_ref(torch.ones(30, 9)))
    return Adapter(deltas={"wte.weight": Chain(first=first, then=low((30, 9), 2, 0, layer="embedding"))})


def plain(shape: tuple[int, ...], layer: str = "unknown") -> Adapter:
    return Adapter(deltas={NAME: low(shape, 2, 0, layer=layer)})


REFUSED: list[tuple[list[tuple[Adapter, float]], type[LoratoolsError], str]] = [
    ([(saved(1), 1.0), (saved(2), 1.0)], MatchError, r"head\.weight: several adapters save this tensor whole"),
    ([(saved(1), 0.5)], UnsupportedError, r"head\.weight: a tensor saved whole has weight 1: found 0\.5"),
    ([(saved(1), 0.7), (saved(1), 0.7)], UnsupportedError, "has weight 1: found 0.7, 0.7"),
    ([(dora(), 1.0), (with_bias(0), 1.0)], UnsupportedError, r"h\.0\.up\.weight: a DoRA delta is no difference.*give --base, and --rank"),
    ([(dora(), 0.5)], UnsupportedError, "a DoRA delta is no difference"),
    ([(chain(), 1.0), (chain(), 1.0)], MatchError, "several adapters change this tensor, and one saves it whole: found chain"),
    ([(chain(), 0.5)], UnsupportedError, "a tensor saved whole has weight 1: found 0.5; --base tells"),
    ([(plain((9, 9)), 1.0), (plain((9, 9), "transposed"), 1.0)], AmbiguousError, "this square weight is stored transposed.*give --base"),
    ([(matrix(), 1.0), (plain((20, 7)), 1.0)], OptionError, r"h\.0\.up\.weight: this change has no small factors.*expected --rank"),
    ([(plain((20, 7)), 1.0), (plain((20, 8)), 1.0)], ShapeError, r"found \[20, 8\], expected \[20, 7\]"),
    (
        [(plain((9, 9), layer), 1.0) for layer in ("embedding", "linear")],
        MatchError,
        "different layers: found embedding, linear",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "error", "message"), REFUSED)
def test_what_has_no_sum(tmp_path: Path, given: list[tuple[Adapter, float]], error: type[LoratoolsError], message: str) -> None:
    with pytest.raises(error, match=message):
        combine(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dora_and_chains_alone_at_weight_1_come_along(tmp_path: Path) -> None:
    combine([dora()], tmp_path / "dora")
    after = load(tmp_path / "dora")[NAME]
    assert isinstance(after, DoRA) and torch.equal(dense(after), dense(dora()[NAME]))
    receipt = checked(combine([chain(), with_bias(0)], tmp_path / "chain"), tmp_path / "chain")
    assert torch.equal(dense(load(tmp_path / "chain")["wte.weight"]), dense(chain()["wte.weight"]))
    assert any("no tensor is in two" in note for note in receipt["notes"])


@pytest.mark.parametrize("options", [{"method": "linear"}, {"rank": 0}, {"rank": 1.5}, {"threads": 0}, {"dtype": "int4"}])
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as error:
        combine([with_bias(0)], tmp_path / "out", **options)
    assert "method" not in options or "expected sum or ties or" in str(error.value)
    with pytest.raises(OptionError):
        combine([], tmp_path / "out")
    with pytest.raises(OptionError):
        combine([(with_bias(0), float("nan"))], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@settings(max_examples=30)
@given(
    st.lists(st.tuples(adapters(dtypes=DTYPES), weights), min_size=1, max_size=3), st.sampled_from([{"energy": 0.9}, {"max_error": 0.3}])
)  # fmt: skip
def test_the_least_ranks_within_an_error(
    tmp_path_factory: pytest.TempPathFactory, given: list[tuple[Adapter, float]], rule: dict[str, float]
) -> None:
    out = tmp_path_factory.mktemp("e") / "out"
    receipt = checked(combine(given, out, **rule), out)
    limit = math.sqrt(1 - rule["energy"]) if "energy" in rule else rule["max_error"]
    total, sizes = sums(given)
    for name, row in rows_of(receipt).items():
        norm, noise = float(total[name].norm()), FLOAT64 * sizes[name]
        sigma = torch.linalg.svdvals(total[name])
        # 2⁻⁸: one bfloat16 adapter alone keeps its dtype, whose rounding may leave no rank but its own
        assert row["error"] <= limit + 1e-6 or row["error"] <= 2.0**-8
        if row["rank"] > 1 and norm > 1e6 * noise and row["error"] > 2.0**-8:
            assert float(sigma[row["rank"] - 1 :].norm()) > (limit - 0.01) * norm
