"""errors: one line that names place, fact, found, expected and remedy, whatever a file calls its tensors."""

from __future__ import annotations

import builtins
import pickle

import pytest

from loratools import errors
from loratools.errors import Faults, FormatError, LoratoolsError, MatchError, raise_all

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LoratoolsError)]


def test_the_line_says_place_fact_found_expected_and_remedy() -> None:
    error = FormatError("rank differs", file="a.safetensors", tensor="q", found=4, expected=8, remedy="give --rank 8")
    assert str(error) == "a.safetensors: q: rank differs: found 4, expected 8; give --rank 8"
    assert str(FormatError("empty")) == "empty"
    assert str(FormatError("zero", found=0)) == "zero: found 0"


def test_place_is_filled_in_once_where_it_was_open() -> None:
    error = FormatError("f", tensor="inner").at(file="one", tensor="outer").at(file="two")
    assert str(error) == "one: inner: f"


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\x00b", "a\u202eb", "a\ud800b", "a\r\tb"])
def test_names_from_files_cannot_break_the_line_nor_the_terminal(name: str) -> None:
    text = str(FormatError("f", tensor=name))
    assert text.isprintable()
    text.encode("utf-8")
    assert text.startswith("a")
    assert text.endswith("b: f")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (LoratoolsError, Faults)])
def test_every_error_is_drawn_in_the_tree_and_has_a_builtin_parent(kind: type[LoratoolsError]) -> None:
    parents = [parent.__name__ for parent in kind.__mro__ if getattr(builtins, parent.__name__, None) is parent]
    assert parents[0] not in ("Exception", "BaseException", "object")
    line = next(line for line in (errors.__doc__ or "").splitlines() if f" {kind.__name__} " in line)
    own = [base.__name__ for base in kind.__bases__ if not issubclass(base, LoratoolsError)]
    assert all(f"({name})" in line for name in own)


def test_every_error_is_documented() -> None:
    assert all(kind.__doc__ and kind.__doc__ != LoratoolsError.__doc__ for kind in KINDS if kind is not LoratoolsError)


def test_none_one_and_several_faults() -> None:
    raise_all([])
    with pytest.raises(MatchError, match="b: lonely"):
        raise_all([MatchError("lonely", tensor="b")])
    with pytest.raises(Faults) as caught:
        raise_all([MatchError("one"), Faults([FormatError("two"), FormatError("three")])])
    assert [error.fact for error in caught.value.errors] == ["one", "two", "three"]
    assert str(caught.value.at(file="f")) == "f: one\nf: two\nf: three"


def test_errors_survive_the_way_between_processes() -> None:
    for error in (FormatError("f", file="a", found=1), Faults([FormatError("f", tensor="t"), MatchError("m")])):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
