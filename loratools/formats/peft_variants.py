"""peft's variants of LoRA: factors stored in another layout, and tensors that only training reads.

Each is told by a setting and excludes the others. Read from peft 0.21.2 (`tuners/lora/variants.py`) and, for merged layers, 0.1 and
0.2 (`tuners/lora.py`); told in spec/formats/peft.md, "Variants".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loratools.errors import FormatError, ShapeError, UnsupportedError
from loratools.formats._derived import repeated, rows_apart, spread_blocks
from loratools.formats.peft_keys import Module
from loratools.formats.peft_values import Values, given, short
from loratools.refs import Ref

SETTINGS = ("use_dora", "use_qalora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config", "enable_lora")
_AFTER_02 = ("use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "ensure_weight_tying", "trainable_token_indices")
_GROUPS = 2  # of the convolution that is lora_B in a merged layer, however many slots are on
SAMPLER = "lora_monteclora_sampler"
SAMPLES = ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")
_TRAINED = ("lora_diag", "lora_velora_embed", *(f"{SAMPLER}.{name}" for name in SAMPLES))


class Plain(NamedTuple):
    """Factors as an ordinary LoRA's, the rank that the config states for them, and what alpha is to be multiplied by."""

    A: Ref
    B: Ref
    rank: int
    times: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a config says of the layout: at most one of these; `trained` are the settings of tensors that only training reads."""

    pooled: int | None = None
    blocks: int | None = None
    blocked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    strict: bool = True
    enabled: tuple[bool, ...] | None = None
    kasa: bool = False
    trained: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether its layers are LoRA's own in all but what only training reads."""
        return not (self.pooled or self.blocks or self.enabled or self.kasa)

    def check_linear(self) -> None:
        """Raise UnsupportedError for a variant: peft has them on linear layers alone."""
        if not self.plain or self.trained:
            raise UnsupportedError("a variant of LoRA on an embedding or a convolution, where peft has none")

    def factors(self, path: str, A: Ref, B: Ref) -> Plain:
        """A module's factors in LoRA's own layout, the same elements arranged anew. Raises ShapeError, FormatError."""
        rank = A.spec.shape[0] if A.spec.shape else 0
        if self.enabled is not None:
            return self._merged(A, B)
        if len(A.spec.shape) != 2:
            self.check_linear()
        if self.plain or self.kasa or len(A.spec.shape) != 2 or len(B.spec.shape) != 2:
            return Plain(A, B, rank)
        if self.pooled is not None:
            return Plain(repeated(A, self.pooled), B, rank, A.spec.shape[1] / self.pooled)  # in/g² = (in/g)/g
        side = self._side(path)
        if side == "A":
            return Plain(self._spread(A, "A"), B, rank)
        return Plain(A, self._spread(B, "B") if side == "B" else B, rank)

    def _merged(self, A: Ref, B: Ref) -> Plain:
        """MergedLinear: rows of B for the slots that are on, in two groups of columns whatever their number."""
        assert self.enabled is not None
        slots, on = len(self.enabled), sum(self.enabled)
        a, b = A.spec.shape, B.spec.shape
        if len(a) != 2 or len(b) != 3 or b[2] != 1 or a[0] % on or b[0] % on or b[0] % _GROUPS or b[1] * _GROUPS != a[0]:
            expected = f"A [r·{on}, in], B [out·{on}/{slots}, r·{on}/{_GROUPS}, 1]"
            raise ShapeError("not the factors of a merged layer", found=f"A {list(a)}, B {list(b)}", expected=expected)
        return Plain(A, rows_apart(spread_blocks(B.reshape(*b[:2]), _GROUPS), self.enabled), a[0] // on, on)

    def _side(self, path: str) -> str | None:
        """Which factor of a module is block-diagonal: the one that a part of its path is listed for."""
        sides = [side for side, parts in self.blocked.items() if any(part in path for part in parts)]
        if len(sides) > 1 or (not sides and self.strict):
            listed = "for both of its factors" if sides else "for none of its factors, and match_strict is set"
            raise FormatError(f"use_bdlora lists this module {listed}, which peft refuses", found=path)
        return sides[0] if sides else None

    def _spread(self, ref: Ref, name: str) -> Ref:
        assert self.blocks is not None
        if ref.spec.shape[0] % self.blocks:
            raise ShapeError(f"{name} has rows that are no multiple of nblocks", found=list(ref.spec.shape), expected=self.blocks)
        return spread_blocks(ref, self.blocks)

    def check_trained(self, module: Module, plain: Plain) -> tuple[str, ...]:
        """The keys of a module's tensors that only training reads: there, and of the shape they must have. Raises for any other."""
        expected = self._expected(plain)
        found = {slot: ref.spec.shape for slot, ref in module.refs.items() if slot in _TRAINED and (slot != "lora_diag" or not self.kasa)}
        for slot, shape in found.items():
            if slot not in expected:
                fact = "a tensor of a variant that the config does not ask for: peft would drop it in silence"
                raise FormatError(fact, tensor=module.keys[slot], expected="kasa_config, velora_config or monteclora_config")
            if shape != expected[slot]:
                raise ShapeError("does not fit its module", tensor=module.keys[slot], found=list(shape), expected=list(expected[slot]))
        lacking = [slot for slot in expected if slot not in found]
        if lacking and (found or not lacking[0].startswith(SAMPLER)):  # peft makes a sampler when it first trains: none is no fault
            raise FormatError(f"has no {lacking[0]} beside it", remedy="the file is incomplete")
        return tuple(module.keys[slot] for slot in found)

    def _expected(self, plain: Plain) -> dict[str, tuple[int, ...]]:
        if "num_groups" in self.trained:
            return {"lora_velora_embed": (-(-plain.A.spec.shape[1] // self.trained["num_groups"]),)}
        if "num_samples" in self.trained:
            rank, samples = plain.rank, self.trained["num_samples"]
            return dict(zip([f"{SAMPLER}.{name}" for name in SAMPLES], [(rank,), (samples,), (rank, rank), (samples,)], strict=True))
        return {}


def variant_of(values: Values) -> Variant:
    """The variant a config asks for; faults are gathered."""
    config = values.config
    asked = [name for name in SETTINGS if given(config.get(name))]
    asked += ["init_lora_weights"] if asked and str(config.get("init_lora_weights")).lower() == "mica" else []
    if len(asked) > 1:
        values.faults.append(FormatError("adapter_config.json asks for two variants of LoRA, which peft refuses", found=", ".join(asked)))
        return Variant()
    name = asked[0] if asked else None
    if name in _READ:
        return _READ[name](values)
    if name == "use_dora" or name is None:
        return Variant()
    if not isinstance(config[name], dict):
        values.fault(name, "a table of settings")
        return Variant()
    return _TABLES[name](Values(config[name], values.faults, f"{name}."), values)


def _pooled(values: Values) -> Variant:
    if given(values.config.get("lora_bias")):
        values.faults.append(UnsupportedError("lora_bias beside use_qalora: peft's forward leaves the bias out"))
    return Variant(pooled=values.needed("qalora_group_size")) if values.flag("use_qalora") else Variant()


def _truncated(inner: Values, values: Values) -> Variant:
    inner.known("beta", "gamma")
    return Variant(kasa=True)


def _compressed(inner: Values, values: Values) -> Variant:
    inner.known("num_groups", "scale", "init_type")
    return Variant(trained={"num_groups": inner.needed("num_groups")})


def _sampled(inner: Values, values: Values) -> Variant:
    inner.known("num_samples", "use_entropy", "dirichlet_prior", "sample_scaler", "kl_loss_weight", "buffer_size")
    return Variant(trained={"num_samples": inner.needed("num_samples")})


def _blocked(inner: Values, values: Values) -> Variant:
    inner.known("target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict")
    if given(values.config.get("lora_bias")):
        values.faults.append(UnsupportedError("lora_bias beside use_bdlora: peft's block-diagonal layers have no bias"))
    parts = {"A": inner.names("target_modules_bd_a"), "B": inner.names("target_modules_bd_b")}
    strict = inner.config.get("match_strict", True)
    if not isinstance(strict, bool):
        inner.fault("match_strict", "true or false")
    return Variant(blocks=inner.needed("nblocks"), blocked=parts, strict=strict is True)


def _merged(values: Values) -> Variant:
    flags = values.config["enable_lora"]
    if not isinstance(flags, list) or not all(isinstance(flag, bool) for flag in flags) or not any(flags):
        values.fault("enable_lora", "a list of true and false, one true at least")
        return Variant()
    later = [name for name in _AFTER_02 if given(values.config.get(name))]
    if later:
        fact = "enable_lora is of peft 0.1 and 0.2, which have no such setting"
        values.faults.append(FormatError(fact, found=f"{later[0]} {short(values.config[later[0]])}"))
    return Variant(enabled=tuple(flags))


_READ = {"use_qalora": _pooled, "enable_lora": _merged}
_TABLES = {"use_bdlora": _blocked, "kasa_config": _truncated, "velora_config": _compressed, "monteclora_config": _sampled}
