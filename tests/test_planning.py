"""planning: strengths and renames as they are written, who may meet on one tensor, and sizes that must stay together."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.adapter import Adapter
from loratools.checkpoint import Checkpoint
from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.errors import LoratoolsError, MatchError, QuantizedError, ShapeError, UsageError
from loratools.planning import make_plan, split_renames, split_strength
from loratools.tensors import to_ref
from tests.files import llama_config, llama_tensors, write_checkpoint
from tests.strategies import low_rank, randn

Q, NORM, NEW = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "score.weight"


def whole(*shape: int, seed: int = 0) -> Replacement:
    return Replacement(value=to_ref(randn(*shape, seed=seed)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style", ("style", 1.0)), ("style:0.5", ("style", 0.5)), ("a:b:-2", ("a:b", -2.0)), ("C:style", ("C:style", 1.0)),
        (":0.5", (":0.5", 1.0)), ("style:", ("style:", 1.0)), ("style:1e-3", ("style", 1e-3)),
    ],
)  # fmt: skip
def test_strengths(text: str, expected: tuple[str, float]) -> None:
    assert split_strength(text) == expected


def test_a_path_of_that_very_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style:0.5").mkdir()
    assert split_strength("style:0.5") == ("style:0.5", 1.0) and split_strength(tmp_path) == (tmp_path, 1.0)
    for text in ("style:nan", "style:inf"):
        with pytest.raises(UsageError, match="a strength must be finite"):
            split_strength(text)


def test_renames() -> None:
    assert split_renames(["a=b", "a=", "a=b=c"]) == [("a", "b"), ("a", ""), ("a", "b=c")]
    for text in ("a", "=b", ""):
        with pytest.raises(UsageError, match="--rename"):
            split_renames([text])


def planned(base: Path, *given: tuple[dict[str, Delta], float]) -> list[tuple[str, list[float]]]:
    plan = make_plan(Checkpoint(base), [(Adapter(deltas), strength) for deltas, strength in given])
    assert plan.expected == sum(len(deltas) for deltas, _ in given)
    assert plan.expected == plan.without_effect + sum(map(len, plan.changes.values())), "every delta is accounted for"
    return [(name, [strength for _, strength in found]) for name, found in plan.changes.items()]


def test_strengths_of_several_adapters(base: Path) -> None:
    one, two = {Q: low_rank((8, 8), 2, 0).delta}, {Q: low_rank((8, 8), 2, 1).delta, NORM: whole(8)}
    assert planned(base, (one, 0.5), (two, 1.0)) == [(Q, [0.5, 1.0]), (NORM, [1.0])]
    assert planned(base, (one, 0.0), (two, 1.0)) == [(Q, [1.0]), (NORM, [1.0])]
    assert planned(base, (two, 1.0), ({NORM: whole(8)}, 1.0)) == [(Q, [1.0]), (NORM, [1.0])], "equal bytes are one"


@pytest.mark.parametrize(
    ("one", "two", "error", "text"),
    [
        (({NORM: whole(8)}, 1.0), ({NORM: whole(8, seed=1)}, 1.0), MatchError, "one replaces it whole"),
        (({NORM: whole(8)}, 1.0), ({NORM: whole(8)}, 0.5), MatchError, "replace this tensor alike, which has strength 1: found 1, 0.5"),
        (({Q: low_rank((8, 8), 2, 0).delta}, 1.0), ({Q: whole(8, 8)}, 1.0), MatchError, "one replaces it whole"),
        (({NEW: whole(2, 8)}, 0.5), ({}, 1.0), ShapeError, "a tensor that is new or of another shape has strength 1 or 0"),
    ],
)  # fmt: skip
def test_who_may_not_meet(
    base: Path, one: tuple[dict[str, Delta], float], two: tuple[dict[str, Delta], float], error: type[LoratoolsError], text: str
) -> None:
    with pytest.raises(error, match=text):
        planned(base, one, two)


def test_rows_of_a_weight_and_its_bias_stay_as_many(tmp_path: Path) -> None:
    bias = Q.replace("weight", "bias")
    base = write_checkpoint(tmp_path / "b", llama_tensors() | {bias: randn(8, seed=0)}, llama_config())
    both: dict[str, Delta] = {Q: whole(9, 8), bias: whole(9)}
    assert [name for name, _ in planned(base, (both, 1.0))] == [Q, bias]
    with pytest.raises(ShapeError, match=f"changes its rows, and {bias} does not"):
        planned(base, ({Q: whole(9, 8)}, 1.0))


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "b", llama_tensors(), llama_config(quantization_config={"quant_method": "gptq"}))
    with pytest.raises(QuantizedError, match="the base's weights are quantised"):
        make_plan(Checkpoint(base), [])
