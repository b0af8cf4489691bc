"""peft: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`.

LoRA is read by `peft_lora`, every other method by its row of `peft_methods`. Both leave whole tensors of the base, saved beside what
was adapted, and what a config promises: that is here. Read from peft 0.21.2 (`utils/save_and_load.py`); told in spec/formats/peft.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.full import Replacement
from loratools.deltas.laid import WherePresent
from loratools.errors import FormatError, LoratoolsError, OptionError
from loratools.formats.base import Container, ReadOptions, nearest
from loratools.formats.peft_attention import IN
from loratools.formats.peft_lora import read_lora
from loratools.formats.peft_method import read
from loratools.formats.peft_methods import method_of
from loratools.formats.peft_targets import Targets
from loratools.refs import Spec

NAME = "peft"


def detect(container: Container) -> bool:
    """Whether the config beside the tensors says which of peft's methods it is; torchtune writes one beside its own tensors too."""
    told = container.config is not None and "peft_type" in container.config
    return told and not any(key.endswith(".lora_a.weight") for key in container.tensors)


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter a peft folder holds; every tensor of it becomes part of a delta or is named in an error."""
    options = options or ReadOptions()
    if container.config is None and options.format == NAME:  # tensors without their config: LoRA, of which --alpha-in tells the scale
        container = replace(container, config={"peft_type": "LORA"})
    kind = str((container.config or {}).get("peft_type")).upper()
    if options.initial is not None and kind != "LORA":
        raise OptionError("--initial is for peft's LoRA", file=container.path, found=kind)
    try:
        made = read_lora(container, options) if kind == "LORA" else read(container, options, method_of(kind))
        deltas = _with_whole(made.deltas, made.tensors.whole)
        if not deltas:
            raise FormatError("no adapter tensors in it", found=nearest(container.tensors) or "no tensors")
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    return Adapter(
        deltas=deltas,
        metadata={"peft": dict(made.config.carried), "safetensors": dict(container.metadata)},
        path=container.path,
        format=NAME,
        files=container.files,
        expects=_expectation(made.config, deltas, made.tensors.modules, some=made.tensors.some),
        notes=(*made.tensors.notes, *made.notes),
        initial=made.initial,
    )


def _with_whole(deltas: Mapping[str, Delta], whole: Mapping[str, Replacement]) -> dict[str, Delta]:
    """Deltas and saved tensors together: a change of a saved tensor comes after it."""
    chained = {name: _after(saved, deltas.get(name)) for name, saved in whole.items()}
    return {**deltas, **chained}


def _after(saved: Replacement, then: Delta | None) -> Delta:
    if isinstance(then, WherePresent):  # it is: it was saved
        then = then.delta
    return saved if then is None else Chain(first=saved, then=then)


def _expectation(
    config: Targets, deltas: Mapping[str, Delta], paths: Iterable[str], *, some: bool
) -> Callable[[Mapping[str, Spec]], Iterable[str]]:
    """What the config promises of a base: each tensor of a module it saves, and where it targets several layers alike, all of them.

    A base may hold more than the model that was trained (a head of another task, a vision tower): a target or bias is
    promised where another layer of the file has its like, or the config names the module in full; so is the bias of a module
    with LoRA, where biases are saved, unless the file itself lists which (`some`). Where a bank is drawn as large as all targets need
    it, every target is promised; and every tensor of the modules (`paths`) of a method that replaces them entirely.
    """
    biases = "none" if some else config.bias
    kin, adapted = {_unnumbered(name) for name in deltas}, {_unnumbered(path) for path in paths}
    modules = {name.rpartition(".")[0] for name in kin}
    every = config.target != "all-linear" and any(delta.draws for delta in deltas.values())

    def alike(name: str, known: set[str] = kin) -> bool:
        shape = _unnumbered(name)
        return shape in known or any(shape.endswith("." + other) or other.endswith("." + shape) for other in known)

    def replaced(module: str) -> bool:
        parts = module.split(".")
        owners = [".".join(parts[: count + 1]) for count in range(len(parts))]
        return any(config.names(owner) or (config.targets(owner) and alike(owner, adapted)) for owner in owners)

    def expected(base: Mapping[str, Spec]) -> Iterator[str]:
        for name, spec in base.items():
            module, _, leaf = name.rpartition(".")
            adapts = leaf == config.tensor or (leaf == IN and config.tensor == "weight")
            owed = adapts and spec.floating and (leaf == "bias" or len(spec.shape) > 1)
            whole = module.removesuffix(".out_proj")
            targeted = config.targets(module) or (f"{whole}.{IN}" in base and config.targets(whole))
            if (
                config.saves(module)
                or (config.tensor == "*" and replaced(module))
                or (owed and config.names(module))
                or (owed and config.target is not None and targeted and (every or alike(name)))
                or (config.parameter(name) and spec.floating and len(spec.shape) in (2, 3) and _unnumbered(module) in modules)
                or (leaf == "bias" and biases == "all" and alike(name))
                or (leaf == "bias" and biases != "none" and targeted and alike(f"{module}.weight"))
            ):
                yield name

    return expected


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)
