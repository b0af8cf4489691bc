"""Running the real client against the Hub on loopback: in a process of its own, since it reads its settings when imported."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from tests.hub.server import Hub

ROOT = Path(__file__).parents[2]


@dataclass
class Client:
    """A person's machine: its cache of the Hub, its token, its settings."""

    hub: Hub
    home: Path
    token: str | None = None
    settings: dict[str, str] = field(default_factory=dict)

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        made = {
            "HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        token = {"HF_TOKEN": self.token} if self.token is not None else {}
        return kept | made | token | self.settings | more

    def loratools(self, *words: str | Path, cwd: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
        """`loratools WORDS…`; settings are variables of its environment."""
        command = [sys.executable, "-m", "loratools", *map(str, words)]
        return subprocess.run(command, env=self.environment(**settings), capture_output=True, text=True, timeout=60, cwd=cwd or self.home)

    def python(self, code: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """A few lines of Python."""
        command = [sys.executable, "-c", textwrap.dedent(code)]
        return subprocess.run(command, env=self.environment(**settings), capture_output=True, text=True, timeout=60, cwd=self.home)

    @property
    def cache(self) -> Path:
        return self.home / "hub"

    def blobs(self) -> dict[str, bytes]:
        """What the cache holds, by the names of its blobs."""
        return {path.name: path.read_bytes() for path in self.cache.glob("models--*/blobs/*")}
