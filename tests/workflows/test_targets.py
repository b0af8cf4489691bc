"""The targets' files: what they may say, and spec/check.md, which lists their rules.

python tests/workflows/test_targets.py     writes the tables of spec/check.md anew
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

from loratools.deltas.terms import TERMS
from loratools.errors import FormatError, OptionError
from loratools.formats import FORMATS
from loratools.workflows._rules import PREDICATES
from loratools.workflows.targets import Rule, names, parse, target_of

DOCUMENT = Path(__file__).parents[2] / "spec" / "check.md"
BEGIN, END = "<!-- rules: written by tests/workflows/test_targets.py -->\n", "<!-- end of rules -->"
RULES = [(name, rule) for name in names() for rule in target_of(name).rules]
TOML = """
title = "One"
format = "peft"
reads = ["peft"]
[sources.here]
project = "one"
version = "1"
file = "one.py"
url = "https://example.org/one.py"
[[rules]]
id = "dora"
loses = "refuse"
when = "kind"
with = { kinds = ["dora"] }
reason = "One has no DoRA."
source = "here"
where = "load"
fit = "lora"
"""


def test_these_are_the_targets() -> None:
    assert names() == ("comfyui", "diffusers", "kohya", "llama.cpp", "mlx", "peft", "sglang", "vllm")
    with pytest.raises(OptionError, match="unknown --for: found tgi, expected comfyui or diffusers or"):
        target_of("tgi")


@pytest.mark.parametrize("name", names())
def test_a_target_writes_a_format_that_it_reads(name: str) -> None:
    target = target_of(name)
    known = {row.name for row in FORMATS} | {"gguf"}
    assert target.format in target.reads and set(target.otherwise) <= set(target.reads)
    assert set(target.reads) <= known
    assert {word for rule in target.rules for word in (*rule.formats, *rule.unless)} <= known
    assert target.rules[0].when == "format"


def test_the_kinds_that_rules_name_are_kinds_of_deltas() -> None:
    named = {kind for _, rule in RULES for word in ("kinds", "but") for kind in rule.settings.get(word, ())}
    assert named <= set(TERMS)


@pytest.mark.parametrize(("name", "rule"), RULES, ids=lambda value: value if isinstance(value, str) else value.id)
def test_a_rule_says_all_that_a_person_needs(name: str, rule: Rule) -> None:
    assert rule.when in PREDICATES
    assert set(rule.settings) <= set(inspect.signature(PREDICATES[rule.when]).parameters) - {"subject"}
    assert rule.source.url.startswith("https://") and rule.source.version and rule.source.file and rule.source.where
    assert rule.loses == "note" or rule.reason.endswith(".")
    assert "|" not in rule.reason
    assert rule.remedy is None or rule.fit in ("none", "write")


def test_a_target_is_read_from_toml() -> None:
    target = parse("one", TOML)
    assert (target.title, target.format, target.uniform_rank, target.max_rank) == ("One", "peft", False, None)
    (rule,) = target.rules
    assert (rule.id, rule.loses, rule.settings, rule.fit) == ("dora", "refuse", {"kinds": ["dora"]}, "lora")
    assert (rule.source.project, rule.source.where, rule.remedy) == ("one", "load", None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "One"', "", "one.toml: lacks a word: expected title"),
        ('title = "One"', 'title = "One"\nname = "x"', r"one.toml: a word that is none: found name, expected fit, format"),
        ('url = "https', 'link = "https', "one.toml: sources.here: lacks a word: expected url"),
        ('loses = "refuse"', 'loses = "break"', r"rules\[0\]: loses: found break, expected refuse or ignore or mis-scale or note"),
        ('fit = "lora"', 'fit = "repair"', r"rules\[0\]: fit: found repair, expected lora or bake or rank or apart or beside or"),
        ('source = "here"', 'source = "there"', r"one.toml: rules\[0\]: source: found there, expected here"),
        ('reason = "One has no DoRA."', "", r"one.toml: rules\[0\]: lacks a word: expected reason"),
        ('title = "One"', "title = One", "one.toml: no TOML"),
    ],
)
def test_what_is_no_target_is_told(old: str, new: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse("one", TOML.replace(old, new))


def test_two_rules_of_one_id_are_told() -> None:
    with pytest.raises(FormatError, match=r"one.toml: two rules of one id: found dora"):
        parse("one", TOML + TOML[TOML.index("[[rules]]") :])


# -- spec/check.md


def tables() -> str:
    """Every target's rules as Markdown."""
    parts = []
    for name in names():
        target = target_of(name)
        writes = " or ".join((target.format, *target.otherwise))
        parts.append(f"### {target.title} (`--for {name}`)\n\nReads {', '.join(target.reads)}; `fit` writes {writes}.\n")
        lines = ["| rule | loses | what it does | fit | of | read from |", "|---|---|---|---|---|---|"]
        for rule in target.rules:
            of = ", ".join(rule.formats) or (f"all but {', '.join(rule.unless)}" if rule.unless else "all")
            source = f"{rule.source.project} {rule.source.version}, [{rule.source.file}]({rule.source.url}): {rule.source.where}"
            fit = "–" if rule.fit == "none" else rule.fit
            lines.append(f"| {rule.id} | {rule.loses} | {rule.reason} | {fit} | {of} | {source} |")
        parts.append("\n".join(lines) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def written() -> str:
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + tables() + END + rest.partition(END)[2]


def test_the_document_lists_the_rules() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == written(), "python tests/workflows/test_targets.py writes spec/check.md anew"


if __name__ == "__main__":
    DOCUMENT.write_text(written(), encoding="utf-8")
    sys.exit(0)
