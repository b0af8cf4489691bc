"""A process that has imported what takes long and forks for each command: what a fresh interpreter does, without its first second.

huggingface_hub, which reads its settings when it is imported, is not among what is imported here, so each command has settings of
its own. The pauses between tries are cut short; whoever wants the real ones starts a fresh interpreter.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from loratools.source import remote

remote.PAUSES = (0.01, 0.01, 0.01)


def main() -> None:
    """Answer one line of JSON on stdin, a command, by one on stdout, what came of it."""
    import rich.progress  # noqa: F401
    import torch  # noqa: F401

    import loratools.cli._inspected
    import loratools.cli._summary
    import loratools.ops.convert
    import loratools.ops.inspect
    import loratools.ops.merge
    import loratools.ops.verify
    import loratools.source.download  # noqa: F401

    assert "huggingface_hub" not in sys.modules
    for line in sys.stdin:
        print(json.dumps(answered(json.loads(line))), flush=True)


def answered(asked: dict[str, Any]) -> dict[str, Any]:
    """Run the command in a fork; returns its exit code and what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, name) for name in ("stdout", "stderr")]
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for number, place in enumerate(places, 1):
                    os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT), number)
                code = _run(asked)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:  # a traceback, as the interpreter shows it
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        out, err = (place.read_text(encoding="utf-8") for place in places)
        return {"returncode": os.waitstatus_to_exitcode(status), "stdout": out, "stderr": err}


def _run(asked: dict[str, Any]) -> int:
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    if asked["code"] is not None:
        exec(compile(asked["code"], "<code>", "exec"), {"__name__": "__main__"})
        return 0
    from loratools.cli import run

    return run(asked["words"])


if __name__ == "__main__":
    main()
