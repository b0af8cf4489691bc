"""A model card of an adapter or a merge: front matter, what it is, how it is loaded, how it was made, where its limits are.

All of it is told from the files and their receipt. Of a card that is there already the prose stays, and every key of its front
matter; what lies between the markers is written anew. spec/push.md tells the rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratools.errors import FormatError
from loratools.source.publish import LICENSE
from loratools.workflows import _loading, _provenance
from loratools.workflows._checking import Finding
from loratools.workflows._markdown import code, entities, merged, printable, table, top_keys
from loratools.workflows.targets import target_of

BEGIN = "<!-- loratools: from here to its end this is written by `loratools push`, and written anew by the next -->"
END = "<!-- loratools: end -->"
_FRONT = re.compile(r"\s*---[ \t]*(?:\r\n|\r|\n)(?:([\S\s]*?)(?:\r\n|\r|\n))??---[ \t]*(?:\r\n|\n|$)")  # as the Hub's own client reads it
_BEGINS = BEGIN[: BEGIN.index(":")] + ": from "
_BLOCK = re.compile(re.escape(_BEGINS) + r"[^\n]*?-->[\S\s]*?" + re.escape(END))
SHOWN = 3  # places named for one limit


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card tells: `bases` are ids, `report` what `inspect` says of the files, `license` the base's own keys (none: unknown)."""

    repo: str
    bases: Sequence[str]
    relation: str
    report: Mapping[str, Any]
    file: str = ""
    named: bool = False  # the user named the base: it replaces what the card says
    license: Mapping[str, str] = field(default_factory=dict)
    base_parameters: int | None = None
    config: Mapping[str, Any] | None = None
    receipt: Mapping[str, Any] | None = None
    findings: Mapping[str, Sequence[Finding]] = field(default_factory=dict)

    @property
    def task(self) -> str | None:
        found = (self.config or {}).get("task_type")
        return found if isinstance(found, str) else None


def written(facts: Facts, existing: str | None = None, kept: Mapping[str, Any] | None = None) -> str:
    """The card's text; `existing` is the card there is, `kept` its front matter as YAML reads it.

    Raises FormatError for front matter whose keys do not stand on lines of their own, and for a block that begins and does not end.
    """
    before = (existing or "").removeprefix("\ufeff")
    ended = re.search(r"\r?\n", before.lstrip("\r\n"))
    newline = ended[0] if ended is not None else "\n"
    lines, body = split(before)
    stray = [key for key in kept or {} if key not in top_keys(lines)]
    if stray:
        fact = "front matter whose keys do not stand on lines of their own"
        raise FormatError(fact, file="README.md", found=str(stray[0]), remedy="write each as key: value on a line")
    front = merged(lines, metadata(facts, kept or {}))
    block = "\n".join([BEGIN, "", *_body(facts), "", END])
    text = _placed(body, block.replace("\n", newline), newline, facts)
    return newline.join(["---", *front, "---", ""]) + text


def split(text: str) -> tuple[list[str], str]:
    """The lines of a card's front matter, and what follows it."""
    found = _FRONT.match(text)
    if found is None:
        return [], text
    return re.split(r"\r\n|\r|\n", found[1]) if found[1] else [], text[found.end() :]


def metadata(facts: Facts, kept: Mapping[str, Any]) -> dict[str, str | Sequence[str]]:
    """The keys of front matter that are added or replaced: those that are missing, tags, and a base that is none or was named anew."""
    made: dict[str, str | Sequence[str]] = {}
    if facts.named or not _models(kept.get("base_model")):
        made["base_model"] = facts.bases[0] if len(facts.bases) == 1 else list(facts.bases)
        made["base_model_relation"] = facts.relation
    elif "base_model_relation" not in kept:
        made["base_model_relation"] = facts.relation
    if "library_name" not in kept and (library := library_of(facts)):
        made["library_name"] = library
    if kept.get("license") is None:
        made |= {key: value for key in LICENSE if (value := facts.license.get(key))} or {"license": "other"}
    if (tags := _tags(facts, kept.get("tags"))) is not None:
        made["tags"] = tags
    return made


def library_of(facts: Facts) -> str | None:
    """The library that loads it, by the Hub's name."""
    if facts.relation == "merge":
        return "diffusers" if facts.report.get("components") else "transformers"
    format = facts.report["format"]
    return "diffusers" if format in _loading.DIFFUSION else {"peft": "peft", "mlx": "mlx"}.get(format)


def _models(value: object) -> bool:
    """Whether the front matter names models of the Hub, and not the folder that a trainer had them in."""
    each = value if isinstance(value, list) else [value]
    return bool(each) and all(map(_provenance.is_model, each))


def _tags(facts: Facts, kept: object) -> list[str] | None:
    """The tags with those that are missing, None where none is or where they are no list."""
    have = [kept] if isinstance(kept, str) else kept if isinstance(kept, list) else [] if kept is None else None
    if have is None or not all(isinstance(one, str) for one in have):
        return None
    kinds = ["merge"] if facts.relation == "merge" else sorted(kind for kind in facts.report["kinds"] if kind in ("lora", "dora"))
    new = [tag for tag in (*kinds, "loratools") if tag not in have]
    return [*have, *new] if new else None


# -- the body


def _placed(body: str, block: str, newline: str, facts: Facts) -> str:
    """The prose, byte for byte, with the block in its place or at its end; of several blocks the first is written, the others go."""
    begins, found = body.count(_BEGINS), list(_BLOCK.finditer(body))
    if len(found) != begins or any(one[0].count(_BEGINS) > 1 for one in found):
        raise FormatError("loratools' block begins and does not end", file="README.md", expected=END, remedy="delete its beginning")
    if found:
        first, rest = found[0], body[found[0].end() :]
        return body[: first.start()] + block + _BLOCK.sub("", rest)
    if not body.strip():
        body = f"{newline}# {entities(facts.repo.rpartition('/')[2])}{newline}"
    return body + newline * (1 if body.endswith(("\n", "\r")) else 2) + block + newline


def _body(facts: Facts) -> list[str]:
    """What is written between the markers; no text of a file can end it."""
    made = [("What it is", _about(facts)), ("Use it", _use(facts)), ("How it was made", _provenance.told(facts.receipt or {}))]
    made += [("Known limits", _limits(facts))]
    lines = [line for title, part in made if part for line in ("", f"## {title}", "", *part)]
    return [printable(line).replace("<!--", "<! --") for line in lines[1:]]


def _about(facts: Facts) -> list[str]:
    report = facts.report
    bases = ", ".join(f"[{entities(base)}](https://huggingface.co/{base})" for base in facts.bases)
    rows = [("merge of" if facts.relation == "merge" else "adapter of", bases), ("licence", _license(facts))]
    if facts.relation == "merge":
        rows += [("tensors", f"{report['tensors']:,}"), ("parameters", f"{report['parameters']:,}"), ("dtypes", _counts(report["dtypes"]))]
    else:
        rows += [("format", code(report["format"])), ("changes", _counts(report["kinds"])), *_sizes(facts)]
    return table(["", ""], [[name, text] for name, text in rows if text])


def _sizes(facts: Facts) -> list[tuple[str, str]]:
    report, base = facts.report, facts.base_parameters
    share = f", {100 * report['parameters'] / (base + report['parameters']):.3g} % of base and adapter" if base else ""
    scalings = [row["scaling"] for row in report["modules"] if row.get("scaling") is not None]
    return [
        ("rank", ", ".join(f"{rank} ({count})" if len(report["ranks"]) > 1 else str(rank) for rank, count in report["ranks"].items())),
        ("scaling", "–".join(dict.fromkeys(f"{one:.4g}" for one in (min(scalings), max(scalings)))) if scalings else ""),
        ("parameters", f"{report['parameters']:,}{share}"),
        ("size", f"{report['bytes']:,} bytes"),
    ]


def _license(facts: Facts) -> str:
    told = facts.license.get("license")
    name = facts.license.get("license_name")
    return f"{code(told)}{f' ({entities(name)})' if name else ''}, as the base's card says" if told else "the base's card tells none"


def _counts(table: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {entities(name)}" for name, count in table.items())


def _use(facts: Facts) -> list[str]:
    if facts.relation == "merge":
        return _loading.merged(facts.repo, facts.config, pipeline=bool(facts.report.get("components")))
    report = facts.report
    ranks = [int(rank) for rank in report["ranks"]]
    names = [row["name"] for row in report["modules"]]
    return _loading.told(
        _loading.Loaded(
            repo=facts.repo, base=facts.bases[0], format=report["format"], file=facts.file, task=facts.task,
            rank=max(ranks, default=None), text=_loading.is_text(names, facts.task), findings=facts.findings,
        )
    )  # fmt: skip


def _limits(facts: Facts) -> list[str]:
    lines = [f"- {entities(warning)}" for warning in facts.report["warnings"]]
    for name, found in facts.findings.items():
        lost = _loading.losses(found)
        for rule in dict.fromkeys(one.rule for one in lost):
            rows = [one for one in lost if one.rule == rule]
            places = ", ".join(code(one.tensor) for one in rows[:SHOWN]) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
            verb = {"refuse": "refuses it", "ignore": "ignores a part", "mis-scale": "scales it wrongly"}[rows[0].kind]
            lines.append(f"- {target_of(name).title} {verb}: {entities(rows[0].reason)} {places}")
    return lines
