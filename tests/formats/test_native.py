"""loratools' own format: its literal bytes, every kind of delta there and back bit for bit, and files that lie."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import given, settings

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain, Part, Stacked
from loratools.deltas.cut import cut
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import Turned, TurnedAdditive, Unsettled, WherePresent
from loratools.deltas.loha import LoHa
from loratools.deltas.lowrank import LowRank
from loratools.deltas.scaled import Scaled
from loratools.deltas.seeded import Projections
from loratools.deltas.vera import VeRA
from loratools.errors import FormatError, LoratoolsError, NotExpressible, ShapeError, UnsupportedError
from loratools.formats import FORMATS, encode, load, save
from loratools.formats._stack import Member
from loratools.formats._typed import known
from loratools.formats.base import Container
from loratools.formats.native import KEY, classes, decode
from loratools.formats.opening import open_container
from loratools.formats.writing import write_container
from loratools.refs import Ref, Spec
from loratools.sliced import Sliced
from loratools.tensors import to_ref
from tests.files import peft_config, raw, write_adapter
from tests.strategies import Drawn, deltas, randn


def low(out: int = 2, into: int = 3, rank: int = 1, **more: Any) -> LowRank:
    return LowRank(A=to_ref(randn(rank, into, seed=0)), B=to_ref(randn(out, rank, seed=1)), **{"alpha": 16.0, **more})


# -- the bytes


def test_the_bytes_of_a_file(tmp_path: Path) -> None:
    """spec/formats/native.md's example."""
    delta = LowRank(A=to_ref(torch.tensor([[1.0, 2.0]])), B=to_ref(torch.tensor([[3.0]])), alpha=0.5, layer="linear")
    save(Adapter({"q.weight": delta}), tmp_path / "q.safetensors", format="loratools")
    said = (
        '{"version":1,"deltas":{"q.weight":{"type":"LowRank","A":{"tensor":"q.weight/A"},"B":{"tensor":"q.weight/B"},"alpha":0.5,'
        '"rslora":false,"layer":"linear"}},"passengers":{},"metadata":{}}'
    )
    header = (
        '{"__metadata__":{"loratools.adapter":' + json.dumps(said) + '},"q.weight/A":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        '"q.weight/B":{"dtype":"F32","shape":[1,1],"data_offsets":[8,12]}}'
    ).encode()
    header += b" " * (-len(header) % 8)
    written = (tmp_path / "q.safetensors").read_bytes()
    assert written == struct.pack("<Q", len(header)) + header + struct.pack("<3f", 1, 2, 3)
    assert said in (Path(__file__).parents[2] / "spec/formats/native.md").read_text()


def test_only_its_own_files_are_detected(tmp_path: Path) -> None:
    save(Adapter({"q.weight": low()}), tmp_path / "own.safetensors", format="loratools")
    assert [row.name for row in FORMATS if row.detect(open_container(tmp_path / "own.safetensors"))] == ["loratools"]
    save(Adapter({"q.weight": low()}), tmp_path / "folder", format="loratools")
    assert (tmp_path / "folder/adapter_model.safetensors").read_bytes() == (tmp_path / "own.safetensors").read_bytes()
    other = write_adapter(tmp_path / "peft", {"lora_A": torch.ones(1, 1)}, peft_config())
    assert [row.name for row in FORMATS if row.detect(open_container(other))] == ["peft"]


# -- there and back


def same(one: Any, other: Any) -> bool:
    """Whether two deltas are of one class, with the same settings and the same bytes all the way down."""
    if isinstance(one, Ref):
        return isinstance(other, Ref) and one.spec == other.spec and bytes(one.read()) == bytes(other.read())
    if isinstance(one, Delta):
        return type(one) is type(other) and all(same(getattr(one, item.name), getattr(other, item.name)) for item in fields(one))
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def there_and_back(folder: Path, adapter: Adapter) -> Adapter:
    """Written and read; writing what was read again gives the same file."""
    save(adapter, folder / "one.safetensors", format="loratools")
    found = load(folder / "one.safetensors")
    save(found, folder / "two.safetensors", format="loratools")
    assert (folder / "one.safetensors").read_bytes() == (folder / "two.safetensors").read_bytes()
    return found


@settings(max_examples=40)
@given(deltas())
def test_every_drawn_delta_comes_back(tmp_path_factory: pytest.TempPathFactory, drawn: Drawn) -> None:
    found = there_and_back(tmp_path_factory.mktemp("n"), Adapter({"w": drawn.delta}))
    assert same(found["w"], drawn.delta)


def vector(size: int) -> Ref:
    return to_ref(randn(size, seed=size))


BANK = to_ref(randn(2, 9, seed=4)), to_ref(randn(8, 2, seed=5))
LOHA = LoHa(
    w1_a=to_ref(randn(4, 2, seed=0)), w1_b=to_ref(randn(2, 6, seed=1)), w2_a=to_ref(randn(4, 2, seed=2)), w2_b=to_ref(randn(2, 6, seed=3)),
    scale=0.7,
)  # fmt: skip
SOME = {
    "lora": low(alpha=16 / 7, rslora=True),
    "dora": DoRA(direction=low(), magnitude=to_ref(randn(2, 1, seed=3, dtype=torch.bfloat16))),
    "full": Full(diff=vector(3), scale=1 / 3),
    "saved": Replacement(value=to_ref(torch.tensor(7)), new=False),
    "chain": Chain(first=Replacement(value=vector(3)), then=Full(diff=vector(3))),
    "part": Part(delta=low(), start=1, stop=3),
    "stack": Stacked(members=(None, low(), None, low(alpha=1.0))),
    "loha": Unsettled(delta=LOHA),
    "turned": TurnedAdditive(delta=LOHA),
    "scaled": Scaled(l=vector(4), offset=1.0),
    "whole": Turned(delta=Scaled(l=vector(4))),
    "bias": WherePresent(delta=Scaled(l=vector(4))),
    "vera 1": VeRA(A=BANK[0], B=BANK[1], b=vector(8), d=vector(2), width=9),
    "vera 2": VeRA(A=BANK[0], B=BANK[1], b=vector(6), d=vector(2)),
    "vera, drawn": VeRA(bank=Projections(seed=-3, rank=2, out=8, width=9), b=vector(6), d=vector(2)),
}


def test_one_of_each_kind_with_what_comes_along(tmp_path: Path) -> None:
    metadata = {"peft": {"base_model_name_or_path": "x/y", "target_modules": ["q"], "lora_dropout": 0.1}, "safetensors": {"format": "pt"}}
    given = Adapter(SOME, metadata=metadata, passengers={"<token>/1": vector(5)})
    found = there_and_back(tmp_path, given)
    assert list(found) == list(SOME) and all(same(found[name], delta) for name, delta in SOME.items())
    assert found.metadata == metadata and same(found.passengers["<token>/1"], given.passengers["<token>/1"])
    assert found.parameters == given.parameters < sum(delta.parameters for delta in given.values())  # the bank once
    assert sum("vera" in key for key in open_container(tmp_path / "one.safetensors").tensors) == 8


def test_every_kind_of_delta_has_fields_that_can_be_said() -> None:
    """A kind that is added later is written without a line of its own; what its fields may be is decided here."""
    unknown = [f"{kind}.{one.name}" for kind, cls in classes().items() for one in fields(cls) if not known(get_type_hints(cls)[one.name])]
    assert not unknown and {"LowRank", "DoRA", "Full", "Replacement", "Chain", "Part", "Stacked"} <= classes().keys()


def test_slices_of_one_tensor_that_are_alike_in_size_are_each_their_own(tmp_path: Path) -> None:
    """A fused weight's q, k and v, an expert's factors, a member of a stack: pieces of one tensor, all of one shape."""
    whole, stack = to_ref(randn(6, 4, seed=0)), to_ref(randn(3, 2, 4, seed=1))
    pieces = {f"rows {start}": Sliced(whole, slice(start, start + 2)) for start in (0, 2, 4)}
    pieces |= {f"columns {start}": Sliced(whole, columns=slice(start, None, 2)) for start in (0, 1)}
    pieces |= {f"member {index}": Member(stack, index) for index in range(3)}
    pieces |= {f"turned {name}": ref.T for name, ref in pieces.items()}
    given = Adapter({name: Full(diff=ref) for name, ref in pieces.items()})
    found = there_and_back(tmp_path, given)
    assert all(same(found[name], given[name]) for name in given)
    assert len(open_container(tmp_path / "one.safetensors").tensors) == len(given)


def test_views_of_one_tensor_are_one_where_they_are_alike(tmp_path: Path) -> None:
    square = to_ref(randn(3, 3, seed=0))
    given = Adapter({name: Full(diff=ref) for name, ref in {"a": square, "b": square.T, "c": square.reshape(9), "d": square.T.T}.items()})
    found = there_and_back(tmp_path, given)
    assert all(same(found[name], given[name]) for name in given)
    assert sorted(open_container(tmp_path / "one.safetensors").tensors) == ["a/diff", "b/diff", "c/diff"]


def test_rows_of_one_tensor_are_each_their_own(tmp_path: Path) -> None:
    """q, k and v cut from a fused change are of one shape and one stored tensor, and no two of them the same."""
    whole = LowRank(A=to_ref(randn(1, 3, seed=0)), B=to_ref(randn(6, 1, seed=1)), alpha=1.0, layer="linear")
    parts = {f"{slot}.weight": cut(whole, 2 * place, 2 * place + 2) for place, slot in enumerate("qkv")}
    save(Adapter(parts), tmp_path / "a.safetensors", format="loratools")
    found = load(tmp_path / "a.safetensors")
    B = whole.B.read()
    assert [bytes(found[name].refs()["B"].read()) for name in parts] == [bytes(memoryview(B).cast("B")[i : i + 8]) for i in (0, 8, 16)]
    assert len(open_container(tmp_path / "a.safetensors").tensors) == 4  # A is one for all


def test_names_that_look_like_keys(tmp_path: Path) -> None:
    dora = DoRA(direction=low(), magnitude=to_ref(torch.ones(2, 1)))
    given = Adapter({"q": dora, "q/direction.A": Full(diff=vector(2)), "q/direction": low()})
    found = there_and_back(tmp_path, given)
    assert all(same(found[name], given[name]) for name in given)


def test_peft_to_it_and_back_keeps_every_byte(tmp_path: Path) -> None:
    tensors = {"base_model.model.q.lora_A.weight": randn(2, 5, seed=0), "base_model.model.q.lora_B.weight": randn(4, 2, seed=1)}
    path = write_adapter(tmp_path / "given", tensors, peft_config(target_modules=["q"], base_model_name_or_path="x/y"))
    direct, around = encode(load(path)), encode(there_and_back(tmp_path, load(path)))
    assert direct.config == around.config and direct.tensors.keys() == around.tensors.keys()
    assert all(bytes(ref.read()) == raw(tensors[key]) for key, ref in around.tensors.items())


# -- what cannot be said


def test_values_without_words_are_collected() -> None:
    @dataclass(frozen=True, eq=False, kw_only=True)
    class Own(Replacement):
        pass

    bad = {"a": Full(diff=vector(2), scale=float("nan")), "b": low(), "c": Own(value=vector(2)), "d": Full(diff=vector(2), scale={1})}  # type: ignore[arg-type]
    with pytest.raises(LoratoolsError) as raised:
        encode(Adapter(bad), "loratools")
    told = str(raised.value).splitlines()
    assert told == [
        "a: scale has a value that JSON has not: found nan; put a finite number in its place",
        "c: a kind of delta that is not loratools' own: found Own; convert it first: --kind lora, or --kind dense",
        "d: scale has a value that JSON has not: found {1}; put a finite number in its place",
    ]
    with pytest.raises(NotExpressible, match="not to be said in JSON"):
        encode(Adapter({"b": low()}, metadata={"x": Path()}), "loratools")


# -- files that lie


def container(**changes: Any) -> Container:
    """A good file's container with parts of its JSON replaced: `deltas`, `passengers`, `metadata`, `version`, or fields of its delta."""
    made = encode(Adapter({"q": DoRA(direction=low(), magnitude=to_ref(torch.ones(2, 1)))}), "loratools")
    said = json.loads(made.metadata[KEY])
    for path, value in changes.items():
        *above, last = path.split("__")
        place = said
        for part in above:
            place = place[part]
        place[last] = value
    return Container(made.tensors, {KEY: json.dumps(said)}, path=Path("x.safetensors"))


def test_the_good_one_is_good() -> None:
    assert isinstance(decode(container())["q"], DoRA)


Q = "deltas__q"


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"version": 2}, UnsupportedError, "version of metadata loratools.adapter: found 2, expected 1; a newer loratools wrote it"),
        ({"more": {}}, FormatError, "metadata loratools.adapter is not what its format says"),
        ({"metadata": {"peft": None}}, FormatError, "what files said, by their format: found {'peft': None}, expected an object for each"),
        ({"deltas": []}, FormatError, "metadata loratools.adapter is not what its format says"),
        ({f"{Q}__type": "Nix"}, UnsupportedError, "q: a kind of delta that this version does not know: found 'Nix'"),
        ({f"{Q}__type": 3}, UnsupportedError, "q: a kind of delta that this version does not know: found 3"),
        ({f"{Q}__eps": 1}, FormatError, "q: the fields of a DoRA: found direction, magnitude, eps, expected direction, magnitude"),
        ({f"{Q}__direction": {"type": "LowRank"}}, FormatError, "q: the fields of a LowRank"),
        ({f"{Q}__direction__alpha": "16"}, FormatError, "q: alpha of a LowRank: found '16', expected float"),
        ({f"{Q}__direction__alpha": float("nan")}, FormatError, "q: a number that is not finite, or too large: found nan"),
        ({f"{Q}__direction__alpha": 10**400}, FormatError, "q: a number that is not finite, or too large: found 1000"),
        ({f"{Q}__direction__rslora": 1}, FormatError, "q: rslora of a LowRank: found 1, expected bool"),
        ({f"{Q}__magnitude": 1.0}, FormatError, "q: magnitude of a DoRA: found 1.0, expected Ref"),
        ({f"{Q}__magnitude__tensor": "gone"}, FormatError, "q: a tensor that the file lacks: found 'gone'"),
        ({f"{Q}__direction": {"type": "Replacement", "value": {"tensor": "q/magnitude"}}}, FormatError, "direction of a DoRA"),
        ({f"{Q}__direction__A__tensor": "q/magnitude"}, ShapeError, "q: A and B do not meet"),
        ({Q: [1]}, FormatError, "q: not a delta"),
        ({Q: 5}, FormatError, "q: not a delta: found 5"),
        ({"passengers": {"p": "gone"}}, FormatError, "p: a tensor that the file lacks: found 'gone'"),
        ({"passengers": {"p": {"tensor": 1}}}, FormatError, "p: a tensor that the file lacks"),
        ({"deltas": {}}, FormatError, "q/direction.A: the metadata does not say what it is"),
    ],
)  # fmt: skip
def test_a_file_that_lies(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(LoratoolsError) as raised:
        decode(container(**changes))
    first = next((item for item in getattr(raised.value, "errors", [raised.value]) if isinstance(item, error)), None)
    assert first is not None and text in str(first) and str(raised.value).startswith("x.safetensors: "), raised.value


DEEP = '{"type":"WherePresent","delta":' * 900 + "1" + "}" * 900


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is not what its format says"),
        ("[]", "is not what its format says"),
        ("[" * 100_000, "is not what its format says"),
        ('{"version":1,"deltas":{"a":1,"a":2},"passengers":{},"metadata":{}}', "names something twice: found a"),
        ('{"version":1,"deltas":{"a":' + DEEP + '},"passengers":{},"metadata":{}}', "a: deltas within deltas without end"),
    ],
)
def test_metadata_that_is_none(text: str, told: str) -> None:
    with pytest.raises(FormatError, match=r"loratools\.adapter|a: ") as raised:
        decode(Container({}, {KEY: text}))
    assert told in str(raised.value)


def test_a_file_without_the_metadata() -> None:
    with pytest.raises(FormatError, match=r"no metadata loratools\.adapter"):
        decode(Container({"x": to_ref(torch.ones(1))}))


def test_a_header_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(Adapter({"q.weight": low()}), tmp_path / "q.safetensors", format="loratools")
    from loratools.tensorfile import InFile

    monkeypatch.setattr(InFile, "_fill", lambda *_: pytest.fail("data was read"))
    assert load(tmp_path / "q.safetensors")["q.weight"].spec(Spec("F32", (2, 3))).shape == (2, 3)


def test_writing_reads_a_block_at_a_time(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watched(Ref):
        spec = Spec("F32", (4, 2))

        def rows(self, start: int, stop: int) -> bytes:
            raise AssertionError("asked for rows")

        def blocks(self, size: int = 0):  # type: ignore[no-untyped-def]
            for row in range(4):
                seen.append(row)
                yield bytes(8)

    write_container(encode(Adapter({"w": Full(diff=Watched())}), "loratools"), tmp_path / "w.safetensors")
    assert seen == [0, 1, 2, 3]
