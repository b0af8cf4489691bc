"""peft's LoRA: each module's tensors as the delta of its weight.

Scale and formulas were read from peft 0.21.2 (`tuners/lora/layer.py`, `dora.py`, `variants.py`) and are told in spec/formats/peft.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full
from loratools.deltas.kasa import KaSA
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError, LoratoolsError, ShapeError, UnsupportedError, raise_all
from loratools.families import matches
from loratools.formats.base import Container, ReadOptions
from loratools.formats.opening import open_container
from loratools.formats.peft_attention import WITHIN, attended, is_attention, target_of
from loratools.formats.peft_config import LoraConfig, parse
from loratools.formats.peft_experts import check_packing, idle_parameters, on_parameters, parameter_grammar, parameter_names, wraps
from loratools.formats.peft_grammar import lora_key
from loratools.formats.peft_initial import on_residuals, without_initial
from loratools.formats.peft_keys import Module, Sorted, check_targeted, sort_keys
from loratools.formats.peft_method import Found
from loratools.formats.peft_notes import unused
from loratools.formats.peft_tokens import take_tokens
from loratools.formats.peft_variants import Plain
from loratools.refs import Ref


def read_lora(container: Container, options: ReadOptions) -> Found:
    """A file of peft's LoRA: its config, its tensors by what they are, their deltas; every fault is collected."""
    stated = container.config or {}
    config = parse(stated, alpha=options.alpha, initial=options.initial is not None)
    found = sort_keys(container, config, parameter_grammar(lora_key, config))
    tokens, notes = take_tokens(found, config.tokens)
    deltas, trained = _deltas(found, config, options)
    check_packing(deltas, config, stated)
    adapted = [path for path, module in found.modules.items() if not wraps(module)] + parameter_names(deltas)
    notes = (*unused(config, stated, adapted, found.whole), *idle_parameters(config, deltas), *notes)
    notes += _listed("not needed, peft reads them while it trains", trained)
    within = [path for path in found.modules if WITHIN in path]
    notes += _listed("out_proj's change counts twice in an nn.MultiheadAttention, as in peft's forward", within)
    initial: tuple[Path, ...] = ()
    if options.initial is not None:
        deltas, initial, more = _less_initial(deltas, config, options)
        notes += more
    elif config.init is not None:
        deltas = on_residuals(deltas, config.init)
    return Found(config, found, {**deltas, **tokens}, notes, initial)


def _less_initial(
    deltas: Mapping[str, Delta], config: LoraConfig, options: ReadOptions
) -> tuple[dict[str, Delta], tuple[Path, ...], tuple[str, ...]]:
    """The deltas less those of the adapter as it was initialised, its files, and what a person should be told."""
    assert options.initial is not None
    container = open_container(options.initial)
    try:
        stated = container.config or {}
        if stated.get("peft_type") != "LORA":
            raise FormatError("--initial is no LoRA of peft's", found=stated.get("peft_type"), expected="LORA")
        theirs = parse(stated, alpha=options.alpha, initial=True)
        if theirs.init not in (None, config.init) and config.init is not None:
            raise FormatError("--initial was initialised in another way", found=theirs.init, expected=config.init)
        found = sort_keys(container, theirs, parameter_grammar(lora_key, theirs))
        take_tokens(found, theirs.tokens)
        started, _ = _deltas(found, theirs, options)
        made = without_initial(deltas, started, config.init)
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    return made, container.files, _listed("not needed of --initial, it has no part in what was moved", list(found.whole))


def _listed(fact: str, names: Sequence[str]) -> tuple[str, ...]:
    shown = ", ".join(names[:3]) + (f", … ({len(names)} in all)" if len(names) > 3 else "")
    return (f"{fact}: {shown}",) if names else ()


def _deltas(found: Sorted, config: LoraConfig, options: ReadOptions) -> tuple[dict[str, Delta], list[str]]:
    """The deltas by tensor's name, and the keys of what only training reads."""
    deltas: dict[str, Delta] = {}
    trained: list[str] = []
    faults: list[LoratoolsError] = []
    for path, module in found.modules.items():
        try:
            if wraps(module):
                deltas |= on_parameters(path, module, config)
                continue
            check_targeted(target_of(path), module, config, nested=f"{path}.weight" in found.whole)
            delta, keys = _delta(path, module, config, options)
            trained += keys
            if is_attention(path, found.modules):
                name, delta = attended(path, module, delta, found.modules)
                deltas[name] = delta
                continue
            deltas[f"{path}.weight"] = delta
            if "bias" in module.refs:
                deltas[f"{path}.bias"] = _bias(path, module, config, saved=found.some or f"{path}.bias" in found.whole)
        except LoratoolsError as error:
            faults.append(error.at(tensor=next(iter(module.keys.values()))))
    raise_all(faults)
    return deltas, trained


def _delta(path: str, module: Module, config: LoraConfig, options: ReadOptions) -> tuple[Delta, tuple[str, ...]]:
    """A module's delta, and the keys of its tensors that only training reads."""
    plain, layer = _embedding(module, config) if any("embedding" in slot for slot in module.refs) else _linear(path, module, config)
    _check_rank(plain, path, module, config)
    trained = config.variant.check_trained(module, plain)
    if config.lora_bias and "lora_B" in module.refs and "bias" not in module.refs:
        raise FormatError("lora_bias is set, and the module has no lora_B.bias", tensor=path, remedy="the file is incomplete")
    alpha = config.alpha_of(target_of(path)) * plain.times
    if config.variant.kasa:
        return _kasa(path, module, plain, alpha, config, options), trained
    low = LowRank(A=plain.A, B=plain.B, alpha=alpha, rslora=config.rslora, layer=layer)
    if layer == "unknown" and matches(f"{path}.weight", options.transposed):
        turned = low.transposed()
        low = LowRank(A=turned.A, B=turned.B, alpha=low.alpha, rslora=low.rslora, layer="transposed")
    magnitude = module.refs.get("lora_magnitude_vector")
    if config.dora and magnitude is None:
        raise FormatError("use_dora is set, and the module has no lora_magnitude_vector", tensor=path)
    if magnitude is None:
        return low, trained
    key = module.keys["lora_magnitude_vector"]
    if not config.dora:
        raise FormatError("a DoRA magnitude without use_dora: peft would drop it in silence", tensor=key, remedy="set use_dora to true")
    return DoRA(direction=low, magnitude=_magnitude(magnitude, low, key)), trained


def _pair(module: Module, a: str, b: str) -> tuple[Ref, Ref]:
    for mine, other in ((a, b), (b, a)):
        if mine not in module.refs:
            place = module.keys.get(other) or next(iter(module.keys.values()))
            raise FormatError(f"has no {mine} beside it", tensor=place, remedy="the file is incomplete")
    return module.refs[a], module.refs[b]


def _linear(path: str, module: Module, config: LoraConfig) -> tuple[Plain, str]:
    """The factors of a linear or convolutional layer as plain LoRA's, and which it is."""
    A, B = _pair(module, "lora_A", "lora_B")
    plain = config.variant.factors(target_of(path), A, B)
    a, b = plain.A.spec.shape, plain.B.spec.shape
    if len(a) < 2 or len(b) != len(a) or any(size != 1 for size in b[2:]):
        raise ShapeError(
            "not a LoRA pair",
            tensor=module.keys["lora_A"],
            found=f"A {list(a)}, B {list(b)}",
            expected="A [rank, in, *kernel], B [out, rank, 1…]",
        )
    if a[0] != b[1] and len(a) > 2 and a[0] % b[1] == 0 and b[1] < a[0]:
        raise UnsupportedError(
            "LoRA on a grouped convolution mixes channels that its weight does not",
            tensor=module.keys["lora_B"],
            found=f"A {list(a)}, B {list(b)}",
        )
    if a[0] != b[1]:
        raise ShapeError("A and B do not meet", found=f"A {list(a)}, B {list(b)}", expected="A [rank, in, ...], B [out, rank]")
    return plain._replace(B=plain.B.reshape(*b[:2])), "unknown" if len(a) == 2 else "conv"


def _embedding(module: Module, config: LoraConfig) -> tuple[Plain, str]:
    A, B = _pair(module, "lora_embedding_A", "lora_embedding_B")
    if "lora_A" in module.refs or "lora_B" in module.refs:
        raise FormatError("a linear and an embedding LoRA on one module", tensor=next(iter(module.keys.values())))
    config.variant.check_linear()
    if len(A.spec.shape) != 2 or len(B.spec.shape) != 2 or A.spec.shape[0] != B.spec.shape[1]:
        raise ShapeError(
            "A and B do not meet",
            found=f"A {list(A.spec.shape)}, B {list(B.spec.shape)}",
            expected="A [rank, vocabulary], B [dimension, rank]",
        )
    return Plain(B.T, A.T, A.spec.shape[0]), "embedding"


def _kasa(path: str, module: Module, plain: Plain, alpha: float, config: LoraConfig, options: ReadOptions) -> KaSA:
    if "lora_diag" not in module.refs:
        raise FormatError("has no lora_diag beside it", tensor=module.keys["lora_A"], remedy="the file is incomplete")
    if "lora_magnitude_vector" in module.refs:
        raise FormatError("a DoRA magnitude without use_dora: peft would drop it in silence", tensor=module.keys["lora_magnitude_vector"])
    if matches(f"{path}.weight", options.transposed):
        raise UnsupportedError("KaSA on a weight stored (in, out), which peft refuses", tensor=module.keys["lora_A"])
    return KaSA(A=plain.A, B=plain.B, d=module.refs["lora_diag"], alpha=alpha, rslora=config.rslora)


def _check_rank(plain: Plain, path: str, module: Module, config: LoraConfig) -> None:
    expected = config.rank(target_of(path))
    if expected is not None and plain.rank != expected:
        key = module.keys.get("lora_A") or module.keys["lora_embedding_A"]
        shape = (plain.B.spec.shape[0], *plain.A.spec.shape[1:])
        remedy = "are A and B swapped?" if expected in shape else None
        raise ShapeError("the rank is not the config's", tensor=key, found=plain.rank, expected=expected, remedy=remedy)


def _magnitude(magnitude: Ref, low: LowRank, key: str) -> Ref:
    out, *rest = low.shape()
    shape = magnitude.spec.shape
    if low.layer == "embedding":
        expected: tuple[int, ...] = (low.shape()[1],)
        made: tuple[int, ...] = (1, low.shape()[1])
    elif low.layer == "transposed":
        expected, made = (low.shape()[1],), (1, low.shape()[1])
    elif low.layer == "conv":
        expected, made = (1, out) + (1,) * (len(rest) - 1), (out,) + (1,) * len(rest)
    else:
        expected, made = (out,), (out, 1)
    if shape != expected:
        raise ShapeError("the magnitude does not fit its factors", tensor=key, found=list(shape), expected=list(expected))
    return magnitude.reshape(*made)


def _bias(path: str, module: Module, config: LoraConfig, *, saved: bool) -> Delta:
    key = module.keys["bias"]
    if config.bias != "none" and not saved:
        raise FormatError(f"bias is {config.bias!r}, and the bias that this is added to is not in the file", tensor=key)
    if not config.lora_bias:
        raise FormatError(
            "lora_B.bias without lora_bias: peft would drop it in silence", tensor=key, remedy="set lora_bias to true in the config"
        )
    if "lora_B" not in module.refs or module.refs["bias"].spec.shape != module.refs["lora_B"].spec.shape[:1]:
        raise ShapeError("the bias does not fit lora_B", tensor=key, found=list(module.refs["bias"].spec.shape))
    plain, _ = _linear(path, module, config)
    low = LowRank(A=plain.A, B=plain.B, alpha=config.alpha_of(path), rslora=config.rslora)
    return Full(diff=module.refs["bias"], scale=low.scaling)
