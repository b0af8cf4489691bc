"""peft's methods that change few numbers of a weight or its spectrum, or put others in their place: rows of the table in `peft_methods`.

Keys, fields and formulas were read from peft 0.21.2, `tuners/<method>/`.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.deltas.base import Delta
from loratools.deltas.fourierft import FourierFT
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.deltas.rows import Rows
from loratools.deltas.shares import Shares
from loratools.deltas.sparse import Sparse
from loratools.deltas.summed import Sum
from loratools.deltas.waveft import WaveFT
from loratools.errors import FormatError, ShapeError
from loratools.formats.peft_method import Method
from loratools.formats.peft_part import Part
from loratools.formats.peft_placed_encode import BEFT, FOURIERFT, LN_TUNING, SHIRA, SUPERTUNING, TRAINABLE_TOKENS, WAVEFT
from loratools.formats.peft_values import short
from loratools.linalg.wavelets import names

SEEDED = "places of coefficients are drawn again from random_loc_seed by torch, not read: another release of torch may draw others"


def _fourierft(part: Part) -> Delta:
    spectrum = part["fourierft_spectrum"]
    _check_count(spectrum.spec.numel, part)
    return FourierFT(spectrum=spectrum, seed=part.whole("random_loc_seed"), scale=part.number("scaling"))


def _waveft(part: Part) -> Delta:
    spectrum = part["waveft_spectrum"]
    seed, bank = part.whole("random_loc_seed"), None
    if part.flag("proportional_parameters", False):
        bank = Shares(seed=seed, rank=part.whole("n_frequency"))
    else:
        _check_count(spectrum.spec.numel, part)
    wavelet = part.word("wavelet_family", *names()) if part.flag("use_idwt") else None
    return WaveFT(spectrum=spectrum, seed=seed, scale=part.number("scaling"), wavelet=wavelet, bank=bank)


def _check_count(found: int, part: Part) -> None:
    expected = part.whole("n_frequency", pattern="n_frequency_pattern")
    if found != expected:
        raise ShapeError("not as many coefficients as n_frequency", found=found, expected=expected)


def _shira(part: Part) -> Delta:
    return Sparse(values=part["shira_weight"], places=part["shira_indices"])


def _supertuning(part: Part) -> Delta:
    places = part.get("supertuning_indices")
    if places is None:
        remedy = "save the adapter with save_precomputed_indices=True: which of the base's numbers are the largest leaves ties open"
        raise FormatError("has no supertuning_indices beside it", remedy=remedy)
    sparse = Sparse(values=part["supertuning_values"], places=places)
    if part.config.get("r") is None:
        if part.config.get("lora_alpha") is not None:
            raise FormatError("adapter_config.json sets lora_alpha, and no r", found=short(part.config["lora_alpha"]))
        return sparse
    A, B = part["supertuning_lora_A.weight"], part["supertuning_lora_B.weight"]
    part.rank("r", A.spec.shape[0], pattern=None)
    low = LowRank(A=A, B=B, alpha=part.number("lora_alpha"), layer="linear")
    return Sum(parts=(sparse, low))


def _beft(part: Part) -> Mapping[str, Delta]:
    bias = part["beft_bias"]
    if bias.spec.shape[:1] != (1,) or len(bias.spec.shape) != 2:
        raise ShapeError("no bias in a row", found=list(bias.spec.shape), expected="[1, out]")
    return {"bias": Full(diff=bias.reshape(bias.spec.numel))}


def _ln_tuning(part: Part) -> Mapping[str, Delta]:
    """A tensor of the module by its own name, or one of a module within by its path, before which peft leaves the adapter's name."""
    found: dict[str, Delta] = {}
    for slot in part.slots():
        _, *path = slot.split(".")
        leaf = ".".join(path[1:] or path)
        if leaf in found:
            raise FormatError("the same tensor of a module twice", found=slot)
        found[leaf] = Replacement(value=part[slot], new=False, alike=True)
    return found


def _tokens(part: Part) -> Delta:
    return Rows(values=part["trainable_tokens_delta"], indices=part.naturals("token_indices"))


PLACED = (
    Method(
        peft_type="FOURIERFT",
        title="few Fourier coefficients at places drawn from a seed",
        slots=("fourierft_spectrum",),
        settings=("scaling", "random_loc_seed", "n_frequency", "n_frequency_pattern"),
        training=("init_weights",),
        own_biases="fourier_only",
        dotted=("n_frequency_pattern",),
        notes=(SEEDED,),
        make=_fourierft,
        writing=FOURIERFT,
    ),
    Method(
        peft_type="WAVEFT",
        title="few wavelet coefficients at places drawn from a seed",
        slots=("waveft_spectrum",),
        settings=(
            "scaling", "random_loc_seed", "n_frequency", "n_frequency_pattern", "proportional_parameters", "wavelet_family", "use_idwt",
        ),
        training=("init_weights",),
        own_biases="waveft_only",
        notes=(SEEDED,),
        make=_waveft,
        writing=WAVEFT,
    ),
    Method(
        peft_type="SHIRA",
        title="numbers at few places",
        slots=("shira_weight", "shira_indices"),
        training=("r", "mask_type", "random_seed", "init_weights"),  # how the places were chosen
        conv1d=False,
        make=_shira,
        writing=SHIRA,
    ),
    Method(
        peft_type="SUPERTUNING",
        title="numbers at few places, and a low-rank product beside them",
        slots=("supertuning_values", "supertuning_indices", r"supertuning_lora_[AB]\.weight"),
        settings=("r", "lora_alpha"),
        training=("sparsity", "select_top", "lora_dropout", "init_weights", "save_precomputed_indices"),  # how the places were chosen
        conv1d=False,
        make=_supertuning,
        writing=SUPERTUNING,
    ),
    Method(
        peft_type="BEFT",
        title="a difference of the bias",
        slots=("beft_bias",),
        training=("init_weights",),
        tensor="bias",
        make=_beft,
        writing=BEFT,
    ),
    Method(
        peft_type="LN_TUNING",
        title="all tensors of a module, normally a norm, in the place of its own",
        slots=(r"ln_tuning_layers\..+",),
        tensor="*",
        make=_ln_tuning,
        writing=LN_TUNING,
    ),
    Method(
        peft_type="TRAINABLE_TOKENS",
        title="rows of an embedding in the place of its own",
        slots=("trainable_tokens_delta",),
        settings=("token_indices",),
        training=("init_weights",),
        tying=True,
        make=_tokens,
        writing=TRAINABLE_TOKENS,
    ),
)
