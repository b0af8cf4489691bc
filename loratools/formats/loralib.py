"""loralib's state dicts (microsoft/LoRA 0.1.2): bare `lora_A` and `lora_B`, beside whole tensors such as heads and biases.

    Linear         MODULE.lora_A (r, in)      .lora_B (out, r)         ΔW = s·B·A, transposed under fan_in_fan_out
    Embedding      MODULE.lora_A (r, num)     .lora_B (dim, r)         ΔW = s·(B·A)ᵀ
    MergedLinear   MODULE.lora_A (r·n, in)    .lora_B (out/slots·n, r) slot by slot, n of them enabled
    Conv2d         MODULE.lora_A (r·k, in·k)  .lora_B (out·k, r·k)     ΔW = s·(B·A) seen in the shape (out, in, k, k) of MODULE.conv.weight

alpha, the enabled slots and a convolution's kernel are constructor arguments and not in the file. Read from
`loralib/layers.py`; the exact forms are derived in spec/formats/loralib.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, NotExpressible, ShapeError, raise_all
from loratools.families import EMBEDDINGS, matches
from loratools.formats._bare import is_litgpt
from loratools.formats._derived import Derived, block_diagonal, cells, slots_apart
from loratools.formats._refused import BAKE, KEPT, nothing, passengers
from loratools.formats._scale import ALPHA, number, only
from loratools.formats.base import Container, ReadOptions
from loratools.refs import Ref

NAME = "loralib"
_COMFYUI = ("diffusion_model.", "text_encoders.")  # where its modules lie, which spells some factors as loralib does
_KEY = re.compile(r"(?:(?P<module>.+)\.)?lora_(?P<factor>[AB])")


def detect(container: Container) -> bool:
    """Whether it holds a bare pair `lora_A`, `lora_B`, no config of peft's, and no module of litgpt's network or of ComfyUI's.

    Of ComfyUI's, which spells factors so too, it is where loratools wrote alpha into the metadata.
    """
    if (container.config is not None and "peft_type" in container.config) or is_litgpt(container):
        return False
    pairs, _ = _sort(container.tensors)
    elsewhere = () if ALPHA in container.metadata else _COMFYUI
    return any(len(pair) == 2 for name, pair in pairs.items() if ".parametrizations." not in f".{name}." and not name.startswith(elsewhere))


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter in a loralib state dict; what is no factor is a whole tensor of it.

    Raises AmbiguousError without an alpha, for a MergedLinear without `enable_lora`, and for a full state dict, which does
    not say whether the weights in it are merged; ShapeError for factors that do not meet.
    """
    options = options or ReadOptions()
    try:
        pairs, others = _sort(container.tensors)
        alpha = options.alpha if options.alpha is not None else number(container.metadata, ALPHA)
        if alpha is None:
            raise AmbiguousError("alpha is not in the file: it is an argument of loralib's layers", remedy="give it with --alpha-in A")
        deltas: dict[str, Delta] = {}
        faults = _full_state(pairs, others) + _idle(pairs, options)
        for module, pair in pairs.items():
            try:
                name, low = _low_rank(module, pair, alpha, options)
                deltas[name] = low
            except LoratoolsError as error:
                faults.append(error.at(tensor=_join(module, f"lora_{next(iter(pair))}")))
        raise_all(faults)
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    deltas |= {name: Replacement(value=ref) for name, ref in others.items()}
    metadata = {"safetensors": dict(container.metadata)}
    return Adapter(deltas, metadata, {}, container.path, NAME, container.files)


def _sort(tensors: Mapping[str, Ref]) -> tuple[dict[str, dict[str, Ref]], dict[str, Ref]]:
    pairs: dict[str, dict[str, Ref]] = {}
    others: dict[str, Ref] = {}
    for key, ref in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            others[key] = ref
        else:
            pairs.setdefault(match["module"] or "", {})[match["factor"]] = ref
    return pairs, others


def _full_state(pairs: Iterable[str], others: Mapping[str, Ref]) -> list[LoratoolsError]:
    """A frozen weight beside its factors: after eval() loralib has merged them into it, and nothing in the file tells."""
    remedy = "save loralib.lora_state_dict(model) instead"
    return [
        AmbiguousError("a full state dict does not say whether the LoRA is already merged into this weight", tensor=name, remedy=remedy)
        for module in pairs
        for name in (_join(module, "weight"), _join(module, "conv.weight"))
        if name in others
    ]


def _idle(pairs: Mapping[str, object], options: ReadOptions) -> list[LoratoolsError]:
    idle = [glob for glob, _ in options.kernels if not any(_fits(glob, module) for module in pairs)]
    return [FormatError("no module of the file fits --conv", found=glob) for glob in idle]


def _fits(glob: str, module: str) -> bool:
    return fnmatchcase(module, glob) or fnmatchcase(module, f"*.{glob}") or fnmatchcase(f"{module}.conv", glob)


# -- the four kinds of layer


def _low_rank(module: str, pair: Mapping[str, Ref], alpha: float, options: ReadOptions) -> tuple[str, LowRank]:
    for factor in "AB":
        if factor not in pair:
            raise FormatError(f"has no lora_{factor} beside it", remedy="the file is incomplete")
    A, B = pair["A"], pair["B"]
    a, b = A.spec.shape, B.spec.shape
    if len(a) != 2 or len(b) != 2 or not b[1] or a[0] % b[1] or a[0] < b[1]:
        raise ShapeError("A and B do not meet", found=_shown(A, B), expected="lora_A [rank, in], lora_B [out, rank]")
    kernel = next((size for glob, size in options.kernels if _fits(glob, module)), None)
    if kernel is not None:
        return _join(module, "conv.weight"), _conv(A, B, alpha, kernel)
    name = _join(module, "weight")
    if a[0] > b[1] or (options.enable_lora and sum(options.enable_lora) == 1):
        A, B, alpha = _merged(A, B, alpha, options.enable_lora)
    low = LowRank(A=A, B=B, alpha=alpha)
    if matches(name, options.embeddings) or matches(name, EMBEDDINGS):
        turned = low.transposed()
        return name, LowRank(A=turned.A, B=turned.B, alpha=alpha, layer="embedding")
    if matches(name, options.transposed):
        turned = low.transposed()
        return name, LowRank(A=turned.A, B=turned.B, alpha=alpha, layer="transposed")
    return name, low


def _merged(A: Ref, B: Ref, alpha: float, enable: tuple[bool, ...] | None) -> tuple[Ref, Ref, float]:
    """MergedLinear as one LoRA of rank r·n: A as it is, each enabled slot's rows of B in columns of their own."""
    enabled = A.spec.shape[0] // B.spec.shape[1]
    shown = f"{_shown(A, B)}: {enabled} slots"
    if enable is None:
        remedy = "give --enable-lora, such as 1,0,1 for query and value of a fused query, key and value"
        raise AmbiguousError("a MergedLinear, and which of its slots are enabled is not in the file", found=shown, remedy=remedy)
    if sum(enable) != enabled or B.spec.shape[0] % enabled:
        raise ShapeError("--enable-lora does not fit", found=shown, expected=f"{sum(enable)} slots")
    return A, slots_apart(B, enable), alpha * enabled


def _conv(A: Ref, B: Ref, alpha: float, k: int) -> LowRank:
    """(B·A) seen as (out, in, k, k) as an ordinary change of rank r·k².

    Row o·k + p of B·A is row p of the kernels of output o; its columns are (channel and kernel position) cut into k runs. So the
    factor of output o has its k rows of B side by side, and A stands k times on the diagonal.
    """
    rows, wide = A.spec.shape
    if A.spec.shape[0] != B.spec.shape[1] or rows % k or wide % k or B.spec.shape[0] % k:
        expected = "lora_A [rank·k, in·k], lora_B [out·k, rank·k]"
        raise ShapeError(f"not the factors of a convolution with kernel {k}", found=_shown(A, B), expected=expected)
    into, out = wide // k, B.spec.shape[0] // k
    spread = block_diagonal(A, k).reshape(rows * k, into, k, k)
    return LowRank(A=spread, B=B.reshape(out, k * rows), alpha=alpha * k * k, layer="conv")


def _shown(A: Ref, B: Ref) -> str:
    return f"lora_A {list(A.spec.shape)}, lora_B {list(B.spec.shape)}"


# -- writing


def encode(adapter: Adapter) -> Container:
    """The adapter as a loralib state dict, with alpha in the metadata; factors keep their bytes.

    Raises NotExpressible for other kinds than LoRA and whole tensors, for layers of different alpha, and for convolutions
    whose factors are not of loralib's form.
    """
    faults = passengers(adapter, "loralib has")
    tensors: dict[str, Ref] = {}
    alphas: dict[str, float] = {}
    for name, delta in adapter.items():
        try:
            tensors |= _encoded(name, delta, alphas)
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    faults += [] if alphas or faults else [nothing(adapter.path, next(iter(adapter), None))]
    raise_all(faults)
    return Container(tensors, {ALPHA: repr(only(alphas, "one alpha is given for all of a loralib file's layers", BAKE))})


def _encoded(name: str, delta: Delta, alphas: dict[str, float]) -> dict[str, Ref]:
    if isinstance(delta, Replacement):
        return {name: delta.value}
    module, _, leaf = name.rpartition(".")
    if not isinstance(delta, LowRank) or leaf != "weight":
        raise NotExpressible(f"loralib cannot say {delta.called} delta", remedy=f"convert it first: --kind lora; {KEPT}")
    A, B, rank = delta.A, delta.B, delta.rank
    if len(A.spec.shape) > 2:
        A, B, rank = _as_loralib(delta)
        module = module.removesuffix(".conv") if module.endswith(".conv") else module
    elif delta.layer in ("embedding", "transposed"):
        A, B = B.T, A.T
    alphas[name] = delta.scaling * rank if delta.rslora else delta.alpha * rank / delta.rank
    return {_join(module, "lora_A"): A, _join(module, "lora_B"): B}


def _as_loralib(delta: LowRank) -> tuple[Ref, Ref, int]:
    """(A, B, r) of a convolution whose A is one matrix k times on the diagonal, as `_conv` makes it."""
    rank, into, *kernel = delta.A.spec.shape
    k = kernel[0]
    shape = f"A {list(delta.A.spec.shape)}"
    if len(kernel) != 2 or kernel != [k, k] or rank % (k * k):
        expected = "a rank of a multiple of k²"
        raise NotExpressible("loralib factorises kernels of k × k another way", found=shape, expected=expected, remedy=KEPT)
    rows, wide = rank // k, into * k
    A = Derived(delta.A, (rows, wide), lambda found: found.reshape(k, rows, k, wide)[0, :, 0])
    if bytes(cells(block_diagonal(A, k))) != bytes(cells(delta.A.reshape(rank, into * k * k))):
        fact = "loralib factorises kernels of k × k another way, and this change has not its form"
        raise NotExpressible(fact, found=shape, remedy=KEPT)
    return A, delta.B.reshape(delta.B.spec.shape[0] * k, rows), rows // k


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
