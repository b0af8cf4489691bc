"""litgpt's adapters: `get_lora_AB` of both of its orders of rows in float64, the slots that are enabled, from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import loratools
from loratools.adapter import Adapter
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, MatchError, NotExpressible, OptionError, ShapeError
from loratools.formats import FORMATS, load, loralib, save
from loratools.formats.base import Container, ReadOptions
from loratools.formats.litgpt import decode, detect, encode
from loratools.formats.opening import open_container
from loratools.tensors import read_tensor, to_ref

HEAD, GROUPS, SIZE, EMBD, RANK = 4, 2, 4, 16, 2
SLOTS = (HEAD * SIZE, GROUPS * SIZE, GROUPS * SIZE)
MODEL = {"name": "Llama-tiny", "n_head": HEAD, "n_query_groups": GROUPS, "n_embd": EMBD}
EVERY = [(True, True, True), (True, False, True), (False, False, True), (True, True, False)]


def hyper(on: tuple[bool, ...]) -> dict[str, object]:
    return {"lora_r": RANK, "lora_alpha": 3, "lora_query": on[0], "lora_key": on[1], "lora_value": on[2]}


def state(on: tuple[bool, ...], module: str = "qkv") -> dict[str, Tensor]:
    torch.manual_seed(0)
    rows = sum(size for size, flag in zip(SLOTS, on, strict=True) if flag)
    name = f"transformer.h.0.attn.{module}"
    found = {f"{name}.lora_A": torch.randn(RANK * sum(on), EMBD), f"{name}.lora_B": torch.randn(rows, RANK)}
    return found | {"transformer.h.0.mlp.proj.lora_A": torch.randn(RANK, 24), "transformer.h.0.mlp.proj.lora_B": torch.randn(EMBD, RANK)}


def container(tensors: dict[str, Tensor], on: tuple[bool, ...], model: dict[str, object] | None = None) -> Container:
    beside = {"hyperparameters.yaml": hyper(on), "model_config.yaml": MODEL if model is None else model}
    return Container({name: to_ref(tensor) for name, tensor in tensors.items()}, beside=beside)


def expected(A: Tensor, B: Tensor, on: tuple[bool, ...], *, interleaved: bool) -> Tensor:
    """get_lora_AB: each enabled slot's product, then `zero_pad` by the indices of its era, as q above k above v."""
    sizes = [size for size, flag in zip(SLOTS, on, strict=True) if flag]
    product = torch.cat([b @ a for a, b in zip(A.double().chunk(sum(on)), B.double().split(sizes), strict=True)]) * (3 / RANK)
    total, group = sum(SLOTS), HEAD // GROUPS + 2
    kinds = [(row // SIZE) % group for row in range(total)]
    grouped = [[row for row in range(total) if (kinds[row] < group - 2, kinds[row] == group - 2, kinds[row] == group - 1)[slot]]
               for slot in range(3)]  # fmt: skip
    plain = [list(range(sum(SLOTS[:slot]), sum(SLOTS[: slot + 1]))) for slot in range(3)]
    where = grouped if interleaved else plain
    full = torch.zeros(total, EMBD, dtype=torch.float64)
    index = list(range(total)) if all(on) else [row for slot in range(3) if on[slot] for row in where[slot]]
    full[index] = product
    return torch.cat([full[rows] for rows in where])


def change(adapter: Adapter, name: str, rows: int) -> Tensor:
    if name not in adapter:
        return torch.zeros(rows, EMBD, dtype=torch.float64)
    low = adapter[name]
    assert isinstance(low, LowRank)
    return low.scaling * read_tensor(low.B, torch.float64) @ read_tensor(low.A, torch.float64)


def bytes_of(adapter: Adapter) -> dict[str, dict[str, bytes]]:
    return {name: {field: bytes(ref.read()) for field, ref in delta.refs().items()} for name, delta in adapter.items()}


@pytest.mark.parametrize("on", EVERY)
@pytest.mark.parametrize("module", ["qkv", "attn"])
def test_both_orders_of_rows(module: str, on: tuple[bool, ...]) -> None:
    tensors = state(on, module)
    adapter = decode(container(tensors, on))
    name = f"transformer.h.0.attn.{module}"
    want = expected(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], on, interleaved=module == "attn")
    slots = zip("qkv", SLOTS, strict=True)
    found = torch.cat([change(adapter, f"model.layers.0.self_attn.{side}_proj.weight", rows) for side, rows in slots])
    torch.testing.assert_close(found, want)  # the same products, summed in another order


@pytest.mark.parametrize("on", EVERY)
def test_from_end_to_end(tmp_path: Path, on: tuple[bool, ...]) -> None:
    folder = tmp_path / "lit"
    folder.mkdir()
    tensors = state(on)
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    text = "".join(f"{key}: {str(value).lower()}\n" for key, value in hyper(on).items())
    (folder / "hyperparameters.yaml").write_text("checkpoint_dir: x\n" + text)
    (folder / "model_config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in MODEL.items()) + "hf_config:\n  name: y\n")
    assert [row.name for row in FORMATS if row.detect(open_container(folder))] == ["litgpt"]
    first = loratools.load(folder)
    loratools.convert(folder, tmp_path / "again", format="litgpt")
    assert bytes_of(loratools.load(tmp_path / "again")) == bytes_of(first)
    written = torch.load(tmp_path / "again/lit_model.pth.lora", weights_only=True)["model"]
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items()) and len(written) == len(tensors)
    loratools.convert(folder, tmp_path / "peft", format="peft")
    assert bytes_of(loratools.load(tmp_path / "peft")) == bytes_of(first)


def test_what_nothing_tells() -> None:
    on = (True, False, True)
    waiting = decode(container(state(on), on, {}))
    with pytest.raises(AmbiguousError, match="nothing tells; give --base"):
        bytes_of(waiting)
    base = {"model_type": "llama", "num_attention_heads": HEAD, "num_key_value_heads": GROUPS, "hidden_size": EMBD}
    assert waiting.pending is not None and "model.layers.0.self_attn.v_proj.weight" in waiting.pending(base)
    tensors = {name: to_ref(tensor) for name, tensor in state(on).items()}
    with pytest.raises(AmbiguousError, match="no alpha"):
        decode(Container(tensors, beside={"model_config.yaml": MODEL}))
    told = {"lora_alpha": 3}
    with pytest.raises(AmbiguousError, match="which of q, k and v are enabled"):
        decode(Container(tensors, beside={"hyperparameters.yaml": told, "model_config.yaml": MODEL}))
    with pytest.raises(ShapeError, match="not the factors of q, k and v"):
        decode(container(state(on), (False, True, True)))
    with pytest.raises(FormatError, match="not a tensor litgpt writes"):
        decode(container({**state(on), "transformer.wte.weight": torch.ones(2, 2)}, on))


def test_which_slots_are_enabled_by_an_option() -> None:
    """Of the newer order it is enough; of the older one without a date it is not known how the rows of some slots lie."""
    on = (True, False, True)
    told = ReadOptions(alpha=3.0, enable_lora=on)
    model = {"model_config.yaml": MODEL}
    for module in ("qkv", "attn"):
        tensors = {name: to_ref(tensor) for name, tensor in state(on, module).items()}
        if module == "qkv":
            assert bytes_of(decode(Container(tensors, beside=model), told)) == bytes_of(decode(container(state(on), on)))
        else:
            with pytest.raises(AmbiguousError, match=r"attn\.attn\.lora_A: how .* changed on 2024-02-05.*hyperparameters\.yaml"):
                decode(Container(tensors, beside=model), told)
    for asked, said in (((True, True), "a 1 or 0 for each of q, k and v"), ((True, True, False), "has them: 1,0,1")):
        with pytest.raises(OptionError, match=f"--enable-lora: found .*{said}"):
            decode(container(state(on), on), ReadOptions(enable_lora=asked))


# -- the other families: (config's name, groups, q k v or the fused weight, other modules)

FAMILIES: dict[str, tuple[str, int, tuple[str, ...], dict[str, str]]] = {
    "phi": (
        "phi-tiny", 4, tuple(f"model.layers.0.self_attn.{slot}_proj" for slot in "qkv"),
        {"attn.proj": "model.layers.0.self_attn.dense", "mlp.fc": "model.layers.0.mlp.fc1", "mlp.proj": "model.layers.0.mlp.fc2"},
    ),
    "gpt_neox": (
        "pythia-tiny", 4, ("gpt_neox.layers.0.attention.query_key_value",),
        {
            "attn.proj": "gpt_neox.layers.0.attention.dense", "mlp.fc": "gpt_neox.layers.0.mlp.dense_h_to_4h",
            "mlp.proj": "gpt_neox.layers.0.mlp.dense_4h_to_h", "lm_head": "embed_out",
        },
    ),
    "falcon": (
        "falcon-tiny", 1, ("transformer.h.0.self_attention.query_key_value",),
        {
            "attn.proj": "transformer.h.0.self_attention.dense", "mlp.fc": "transformer.h.0.mlp.dense_h_to_4h",
            "mlp.proj": "transformer.h.0.mlp.dense_4h_to_h", "lm_head": "lm_head",
        },
    ),
    "mixtral": (
        "Mixtral-tiny", 2, tuple(f"model.layers.0.self_attn.{slot}_proj" for slot in "qkv"),
        {
            "attn.proj": "model.layers.0.self_attn.o_proj", "mlp.gate": "model.layers.0.block_sparse_moe.gate",
            "mlp.experts.1.fc_1": "model.layers.0.block_sparse_moe.experts.1.w1",
            "mlp.experts.1.fc_2": "model.layers.0.block_sparse_moe.experts.1.w3",
            "mlp.experts.1.proj": "model.layers.0.block_sparse_moe.experts.1.w2",
        },
    ),
}  # fmt: skip


def module(name: str) -> str:
    return name if name == "lm_head" else f"transformer.h.0.{name}"


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_of_other_names(kind: str) -> None:
    name, groups, fused, others = FAMILIES[kind]
    sizes, on = (HEAD * SIZE, groups * SIZE, groups * SIZE), (True, True, True)
    torch.manual_seed(3)
    tensors = {
        f"{module('attn.qkv')}.lora_A": torch.randn(3 * RANK, EMBD), f"{module('attn.qkv')}.lora_B": torch.randn(sum(sizes), RANK),
    }  # fmt: skip
    for other in others:
        tensors |= {f"{module(other)}.lora_A": torch.randn(RANK, EMBD), f"{module(other)}.lora_B": torch.randn(EMBD, RANK)}
    adapter = decode(container(tensors, on, {**MODEL, "name": name, "n_query_groups": groups}))
    assert set(adapter) == {f"{weight}.weight" for weight in (*fused, *others.values())}
    blocks = tensors[f"{module('attn.qkv')}.lora_A"].double().chunk(3)
    slots = [b @ a * (3 / RANK) for a, b in zip(blocks, tensors[f"{module('attn.qkv')}.lora_B"].double().split(sizes), strict=True)]
    if len(fused) == 1:  # rows of each group of heads: its q, its k, its v
        split = [slot.view(groups, -1, EMBD) for slot in slots]
        slots = [torch.cat([part[group] for group in range(groups) for part in split])]
    for weight, want in zip(fused, slots, strict=True):
        torch.testing.assert_close(change(adapter, f"{weight}.weight", len(want)), want)  # the same products, summed in another order
    for other, weight in others.items():
        want = tensors[f"{module(other)}.lora_B"].double() @ tensors[f"{module(other)}.lora_A"].double() * (3 / RANK)
        torch.testing.assert_close(change(adapter, f"{weight}.weight", EMBD), want)
    back = encode(adapter).tensors
    assert {key: bytes(ref.read()) for key, ref in back.items()} == {key: bytes(to_ref(one).read()) for key, one in tensors.items()}


# -- what does not fit


def refused(found: Container, error: type[LoratoolsError], said: str) -> None:
    """The first of its faults is of that class, and says that."""
    with pytest.raises(LoratoolsError, match=said) as caught:
        decode(found)
    assert isinstance(getattr(caught.value, "errors", [caught.value])[0], error)


def test_hyperparameters_that_do_not_fit() -> None:
    on = (True, True, True)
    for more, error, said in (
        ({"lora_r": 8}, ShapeError, r"the rank is not that of hyperparameters\.yaml: found 2, expected 8"),
        ({"lora_alpha": "x"}, FormatError, r"hyperparameters\.yaml: lora_alpha: found x, expected a number"),
        ({"lora_alpha": float("inf")}, FormatError, "lora_alpha: found inf, expected a number"),
        ({"lora_alpha": True}, FormatError, "lora_alpha: found True"),
    ):
        found = container(state(on), on)
        refused(Container(found.tensors, beside={**found.beside, "hyperparameters.yaml": {**hyper(on), **more}}), error, said)


def test_models_that_do_not_fit() -> None:
    on = (True, True, True)
    base = {"model_type": "llama", "num_attention_heads": HEAD, "num_key_value_heads": HEAD, "hidden_size": EMBD}
    pending = decode(container(state(on), on)).pending
    assert pending is not None
    with pytest.raises(MatchError, match="its heads are not the base's"):
        pending(base)
    with pytest.raises(FormatError, match="how litgpt names this model's modules is not known here: found bert"):
        pending({"model_type": "bert"})
    refused(container(state(on), on, {**MODEL, "n_query_groups": 3}), FormatError, "heads that make no groups")
    refused(container(state(on), on, {**MODEL, "n_query_groups": "2"}), FormatError, "the heads of litgpt's config")


def test_tensors_that_do_not_fit() -> None:
    on, ones = (True, True, True), torch.ones(2, 2)
    half = {key: one for key, one in state(on).items() if key != "transformer.h.0.mlp.proj.lora_B"}
    refused(container(half, on), FormatError, "has no lora_B beside it")
    flat = {**state(on), "transformer.h.0.mlp.proj.lora_A": torch.ones(2)}
    refused(container(flat, on), ShapeError, "not a factor: found .2., expected a matrix")
    stray = {"transformer.h.0.mlp.gate.lora_A": ones, "transformer.h.0.mlp.gate.lora_B": ones}
    refused(container(state(on) | stray, on), FormatError, "not a module that litgpt has in a llama: expected transformer")


def low(rank: int = 2, alpha: float = 4.0) -> LowRank:
    return LowRank(A=to_ref(torch.ones(rank, EMBD)), B=to_ref(torch.ones(EMBD, rank)), alpha=alpha, layer="linear")


def test_all_of_a_llama_is_written() -> None:
    """Gate and up, fc_1 and fc_2, are two modules of each block, whose numbers are no layer's."""
    sizes = {"self_attn.o": (EMBD, EMBD), "mlp.gate": (2 * EMBD, EMBD), "mlp.up": (2 * EMBD, EMBD), "mlp.down": (EMBD, 2 * EMBD)}
    deltas = {
        f"model.layers.{layer}.{name}_proj.weight": LowRank(
            A=to_ref(torch.ones(2, into)), B=to_ref(torch.ones(out, 2)), alpha=4.0, layer="linear"
        )
        for layer in range(3) for name, (out, into) in sizes.items()
    }  # fmt: skip
    written = encode(Adapter(deltas, model={"model_type": "llama"}))
    assert len(written.tensors) == 2 * 3 * 4 and written.beside["hyperparameters.yaml"]["lora_mlp"] is True
    assert set(decode(written)) == set(deltas)
    gates = {name: delta for name, delta in deltas.items() if "gate" in name}
    alone = encode(Adapter(gates, model={"model_type": "llama"}))
    assert detect(alone) and not loralib.detect(alone) and set(decode(alone)) == set(gates)


def test_a_head_alone_is_known_by_what_lies_beside(tmp_path: Path) -> None:
    save(Adapter({"lm_head.weight": low()}, model={"model_type": "llama"}), tmp_path / "a", format="litgpt")
    assert list(load(tmp_path / "a")) == ["lm_head.weight"] and load(tmp_path / "a").format == "litgpt"
    (tmp_path / "a" / "hyperparameters.yaml").unlink()
    with pytest.raises(AmbiguousError, match="an argument of loralib's layers"):
        load(tmp_path / "a")


def test_what_it_cannot_say() -> None:
    o, down = "model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.mlp.down_proj.weight"
    model = {"model_type": "llama"}
    cases: list[tuple[dict[str, LowRank | DoRA], str]] = [
        ({o.format(0): DoRA(direction=low(), magnitude=to_ref(torch.ones(EMBD, 1)))}, "litgpt has no DoRA; convert --kind lora --base"),
        ({o.format(0): low(), down.format(0): low(3, 6.0)}, "one rank for all modules: found 3.0, expected 2.0, as "),
        ({o.format(0): low(), down.format(0): low(alpha=5.0)}, "one alpha for all modules: found 5.0"),
        (
            {o.format(0): low(), o.format(1): low(), down.format(0): low()},
            r"layers\.0\.mlp\.down_proj\.weight: .*on the same modules of every block: found 2 attn\.proj.*--format peft has it",
        ),
        ({"model.embed_tokens.weight": low()}, "litgpt has no LoRA on this tensor of a llama"),
    ]
    for deltas, said in cases:
        with pytest.raises(NotExpressible, match=said):
            encode(Adapter(dict(deltas), model=model))
    bert = Adapter({o.format(0): low()}, model={"model_type": "bert"})
    with pytest.raises(NotExpressible, match=r"o_proj\.weight: how litgpt names this model's modules is not known .*bert.*; --format peft"):
        encode(bert)
    heads = {**model, "num_attention_heads": 2, "hidden_size": EMBD}
    slots = {f"model.layers.{layer}.self_attn.{slot}_proj.weight": low() for layer, slot in ((0, "q"), (0, "v"), (1, "q"))}
    with pytest.raises(NotExpressible, match=r"layers\.1\.self_attn\.q_proj\.weight: litgpt has LoRA on the same modules of every block"):
        encode(Adapter(slots, model=heads))
    with pytest.raises(NotExpressible, match="no low-rank change to write"):
        encode(Adapter({}, model=model))
    passenger = Adapter({o.format(0): low()}, passengers={"x": to_ref(torch.ones(1))}, model=model)
    with pytest.raises(NotExpressible, match="litgpt has no place for it"):
        encode(passenger)
