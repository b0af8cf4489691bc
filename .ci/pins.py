"""Fails if this environment holds a package that constraints.txt does not pin, or another version of it."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
# pip is the machine's; a torch built for CUDA pins its own companions exactly
EXEMPT = re.compile(r"pip|loratools|triton|nvidia-.*|cuda-.*")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Name and version of each line of constraints.txt."""
    lines = (line.partition("#")[0].strip() for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines())
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def strays() -> list[str]:
    """What is installed and not as pinned; a local label as in 2.13.0+cpu is the same release."""
    pinned = pins()
    installed = {normal(found.metadata["Name"]): found.version.partition("+")[0] for found in distributions()}
    return [
        f"{name} {version}, pinned: {pinned.get(name)}"
        for name, version in sorted(installed.items())
        if pinned.get(name) != version and not EXEMPT.fullmatch(name)
    ]


if __name__ == "__main__":
    found = strays()
    raise SystemExit("\n".join(["not as in constraints.txt:", *found]) if found else 0)
