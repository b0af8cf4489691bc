"""Running the real client against the Hub on loopback: in a process of its own, since it reads its settings when imported."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from tests.hub.server import Hub

ROOT = Path(__file__).parents[2]
TIMEOUT = 60.0
Done: TypeAlias = subprocess.CompletedProcess[str]


class Worker:
    """The process of tests/hub/worker.py, which ends when its stdin does."""

    def __init__(self) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.hub.worker"]
        self.process = subprocess.Popen(command, env=environment, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, asked: dict[str, Any]) -> Done:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
            self.process.kill()
            worker.cache_clear()
            raise subprocess.TimeoutExpired(asked["words"] or "python", TIMEOUT)
        return subprocess.CompletedProcess(asked["words"], **json.loads(self.process.stdout.readline()))


@lru_cache(maxsize=1)
def worker() -> Worker:
    return Worker()


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

    def loratools(self, *words: str | Path, cwd: Path | None = None, fresh: bool = False, **settings: str) -> Done:
        """`loratools WORDS…`; settings are variables of its environment. `fresh` starts an interpreter for it."""
        return self._run([*map(str, words)], None, cwd or self.home, fresh, settings)

    def python(self, code: str, *, fresh: bool = False, **settings: str) -> Done:
        """A few lines of Python."""
        return self._run([], textwrap.dedent(code), self.home, fresh, settings)

    def _run(self, words: list[str], code: str | None, cwd: Path, fresh: bool, settings: dict[str, str]) -> Done:
        environment = self.environment(**settings)
        if not fresh:
            return worker().run({"words": words, "code": code, "cwd": str(cwd), "environment": environment})
        command = [sys.executable, *(["-c", code] if code is not None else ["-m", "loratools", *words])]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, cwd=cwd)

    @property
    def cache(self) -> Path:
        return self.home / "hub"

    def blobs(self) -> dict[str, bytes]:
        """What the cache holds, by the names of its blobs."""
        return {path.name: path.read_bytes() for path in self.cache.glob("models--*/blobs/*")}
