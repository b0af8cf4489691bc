"""What README.md promises, read out of it: the two commands, and the place of the demo's output.

    python .ci/readme.py commands     # each command on a line, as printed in the README
    python .ci/readme.py excerpt      # run the demo and put its output into the README
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
EXCERPT = re.compile(r"(?<=^<!-- what `loratools demo` printed -->\n)```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The shell blocks of the README: two, of one line each; the first runs the demo, the second the tests."""
    blocks = [block.strip() for block in re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]
    if len(blocks) != 2 or any("\n" in block for block in blocks):
        raise SystemExit(f"{README.name} must hold exactly two shell blocks of one line each, found {blocks}")
    return blocks


def excerpt(text: str) -> str:
    """The demo's output as the README shows it."""
    found = EXCERPT.findall(text)
    if len(found) != 1:
        raise SystemExit(f"{README.name} must hold the demo's output once, after its marker")
    return str(found[0])


def main(word: str) -> None:
    text = README.read_text(encoding="utf-8")
    if word == "commands":
        print("\n".join(commands(text)))
    elif word == "excerpt":
        excerpt(text)
        printed = subprocess.run([sys.executable, "-m", "loratools", "demo"], check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
        README.write_text(EXCERPT.sub(lambda _: f"```text\n{printed}```", text), encoding="utf-8")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "")
