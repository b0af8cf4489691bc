"""Every error loratools raises on purpose.

    LoratoolsError
    ├── FormatError (ValueError)            a file's bytes, header or config are not what its format says
    │   └── AmbiguousError                  the file leaves something open that an option must settle
    ├── MatchError (LookupError)            names of adapter and base, or of two checkpoints, do not meet
    ├── ShapeError (ValueError)             names meet, shapes do not
    ├── NonFiniteError (ArithmeticError)    a weight is, or would be written as, inf or nan
    ├── UnsupportedError (NotImplementedError)   understood, and deliberately not done
    │   ├── NotExpressible                  the target format or kind cannot say it
    │   ├── NotInvertible                   the change cannot be undone
    │   └── QuantizedError                  the base's weights are quantised
    ├── OptionError (ValueError)            options that contradict each other or the input
    │   └── UsageError                      options that no input could make right
    ├── OutputError (OSError)               the output cannot be written where it was asked for
    ├── SourceError (OSError)               the Hub, or the way there, does not give what was asked for
    ├── ConvergenceError (ArithmeticError)  a decomposition did not converge on any rung of the ladder
    ├── MissingExtra (ImportError)          an optional dependency is not installed
    └── Faults (ValueError)                 several of the above, shown together

Inner code gives the fact; the boundary that knows the place adds file and tensor with `at`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

_naming: list[Callable[[str | Path], str]] = []  # what a file is called in messages, where it is not its path


def name_files_by(function: Callable[[str | Path], str]) -> None:
    """Let messages call files what the function does: it is told a path and returns a name."""
    _naming[:] = [function]


class LoratoolsError(Exception):
    """The base of every error raised on purpose; its text is one line: place, fact, found, expected, remedy.

    >>> print(FormatError("rank differs", file="a.safetensors", tensor="q.lora_A.weight", found=4, expected=8))
    a.safetensors: q.lora_A.weight: rank differs: found 4, expected 8
    """

    def __init__(
        self,
        fact: str,
        *,
        file: str | Path | None = None,
        tensor: str | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(fact)
        self.fact, self.file, self.tensor = fact, file, tensor
        self.found, self.expected, self.remedy = found, expected, remedy

    def at(self, *, file: str | Path | None = None, tensor: str | None = None) -> Self:
        """The same error with its place filled in where it was still open."""
        self.file = file if self.file is None else self.file
        self.tensor = tensor if self.tensor is None else self.tensor
        return self

    def __str__(self) -> str:
        file = self.file if self.file is None or not _naming else _naming[0](self.file)
        text = ": ".join(str(part) for part in (file, self.tensor, self.fact) if part is not None)
        seen = [f"{word} {value}" for word, value in (("found", self.found), ("expected", self.expected)) if value is not None]
        text += ": " + ", ".join(seen) if seen else ""
        return _printable(" ".join((text + (f"; {self.remedy}" if self.remedy else "")).split()))


def _printable(text: str) -> str:
    """The text with what would move a terminal's cursor or cannot be encoded spelt out: names come from files."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class FormatError(LoratoolsError, ValueError):
    """A file's bytes, header or config are not what its format says."""


class AmbiguousError(FormatError):
    """The file leaves something open; the message names the option that settles it."""


class MatchError(LoratoolsError, LookupError):
    """Names of adapter and base, or of two checkpoints, do not meet."""


class ShapeError(LoratoolsError, ValueError):
    """Names meet, shapes do not."""


class NonFiniteError(LoratoolsError, ArithmeticError):
    """A weight is, or would be written as, inf or nan."""


class UnsupportedError(LoratoolsError, NotImplementedError):
    """Understood, and deliberately not done."""


class NotExpressible(UnsupportedError):
    """The target format or kind cannot say what the adapter holds."""


class NotInvertible(UnsupportedError):
    """The change cannot be undone from what was kept."""


class QuantizedError(UnsupportedError):
    """The base's weights are quantised; merging into them is not plain arithmetic."""


class OptionError(LoratoolsError, ValueError):
    """Options that contradict each other or the input."""


class UsageError(OptionError):
    """Options that no input could make right; the command line exits with 2."""


class OutputError(LoratoolsError, OSError):
    """The output cannot be written where it was asked for."""


class SourceError(LoratoolsError, OSError):
    """The Hub, or the way there, does not give what was asked for."""


class ConvergenceError(LoratoolsError, ArithmeticError):
    """A decomposition did not converge on any rung of the ladder."""


class MissingExtra(LoratoolsError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


class Faults(LoratoolsError, ValueError):
    """Several faults found in one pass; `errors` holds each."""

    def __init__(self, errors: Iterable[LoratoolsError]) -> None:
        self.errors = tuple(errors)
        super().__init__(f"{len(self.errors)} faults")

    def at(self, *, file: str | Path | None = None, tensor: str | None = None) -> Self:
        """Every fault with its place filled in where it was still open."""
        for error in self.errors:
            error.at(file=file, tensor=tensor)
        return self

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))


def raise_all(errors: Iterable[LoratoolsError]) -> None:
    """Raise nothing for no error, the error itself for one, `Faults` for several."""
    found = [inner for error in errors for inner in (error.errors if isinstance(error, Faults) else (error,))]
    if len(found) == 1:
        raise found[0]
    if found:
        raise Faults(found)
