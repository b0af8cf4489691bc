"""Two checkpoints of one model joined by name: what both have is compared, what only one has must be left out by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loratools.checkpoint import Checkpoint
from loratools.errors import LoratoolsError, MatchError, OptionError, QuantizedError, ShapeError, UnsupportedError, raise_all
from loratools.families import Family, matches


@dataclass
class Pair:
    """A base and its fine-tune: `common` names with equal shapes in file order; `alone` are left out with a reason.

    Raises UnsupportedError for a pipeline, QuantizedError for a base or fine-tune whose weights are quantised, and all at once
    MatchError for tensors that only one side has and ShapeError for shapes that differ, unless include and exclude leave them
    out; OptionError for a glob that fits no tensor.
    """

    base: Checkpoint
    tuned: Checkpoint
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    common: list[str] = field(init=False)
    alone: dict[str, str] = field(init=False)
    family: Family = field(init=False)

    def __post_init__(self) -> None:
        for checkpoint in (self.base, self.tuned):
            if "" not in checkpoint.parts:
                remedy = "name the same folder of both, such as unet/ or transformer/"
                raise UnsupportedError("a pipeline of several models, and an adapter is of one", file=checkpoint.path, remedy=remedy)
            if checkpoint.quantization:
                raise QuantizedError(
                    "its weights are quantised", file=checkpoint.path, found=checkpoint.quantization,
                    remedy="give the original 16- or 32-bit weights",
                )  # fmt: skip
        every = list(dict.fromkeys([*self.base, *self.tuned]))
        for option in ("include", "exclude", "embedding", "transposed"):
            _check_globs(option, getattr(self, option), every)
        self.family = Family(self.base.config or self.tuned.config, self.embedding, self.transposed)
        self.common, self.alone = [], {}
        faults: list[LoratoolsError] = []
        for name in every:
            fault = self._fault(name)
            if fault is None:
                self.common.append(name)
            elif self.reason(name):
                self.alone[name] = f"{self.reason(name)}; {fault.fact}"
            else:
                faults.append(fault)
        raise_all(faults)

    def reason(self, name: str) -> str | None:
        """Why the options leave a tensor out, if they do."""
        if self.include and not matches(name, self.include):
            return "not in --include"
        return "in --exclude" if matches(name, self.exclude) else None

    def _fault(self, name: str) -> LoratoolsError | None:
        remedy = "give --exclude with its name to leave it out"
        for checkpoint, other in ((self.base, self.tuned), (self.tuned, self.base)):
            if name not in checkpoint:
                return MatchError(f"only in {_which(other, self.base)}", file=other.path, tensor=name, remedy=remedy)
        here, there = self.base[name].spec, self.tuned[name].spec
        if here.shape != there.shape:
            found, expected = list(there.shape), list(here.shape)
            return ShapeError("shapes differ", file=self.tuned.path, tensor=name, found=found, expected=expected, remedy=remedy)
        return None

    def tie(self) -> tuple[str, str] | None:
        """(embedding, head) that are one tensor in the model and are both in play, whether or not the head is on disk."""
        tied = self.family.tied(self.base)
        if tied is None or tied[0] not in self.common or self.reason(tied[0]) or self.reason(tied[1]):
            return None
        here = tied[1] in self.base, tied[1] in self.tuned
        return tied if here[0] == here[1] else None

    def source(self) -> str | None:
        """The Hub id of the base, where its config or the cache it lies in tells one."""
        stated = self.base.config.get("_name_or_path")
        cached = next((part for part in self.base.path.resolve().parts if part.startswith("models--")), "")
        for text in (stated, cached.removeprefix("models--").replace("--", "/", 1)):
            if isinstance(text, str) and _hub_like(text):
                return text
        return None


def _which(checkpoint: Checkpoint, base: Checkpoint) -> str:
    return "the base" if checkpoint is base else "the fine-tune"


def _hub_like(text: str) -> bool:
    parts = text.split("/")
    plain = all(part and part.strip(".") and all(char.isalnum() or char in "-_." for char in part) for part in parts)
    return len(parts) == 2 and plain and not Path(text).exists()


def _check_globs(option: str, globs: Sequence[str], names: Iterable[str]) -> None:
    stray = [glob for glob in globs if not any(matches(name, [glob]) for name in names)]
    if stray:
        remedy = "globs are matched against whole tensor names, as in *.q_proj"
        raise OptionError(f"--{option} fits no tensor", found=", ".join(stray), remedy=remedy)
