"""Makes tests/data/trained/PROGRAM anew, by the program itself: the adapters it trains on tiny models, and its logits with them.

    python tests/data/make_trained.py mlx | torchtune | litgpt | llama_cpp | nemo

Run from the repository's root with the program installed (tests/data/README.md tells the versions).
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests.interop.trained import DATA, make_base


def make(program: str) -> None:
    trainer = importlib.import_module(f"tests.interop.trainers.with_{program}")
    shutil.rmtree(DATA / program, ignore_errors=True)
    for case in trainer.CASES:
        base, adapter = DATA / "bases" / case.partition("-")[0], DATA / program / case
        if not base.exists():
            make_base(base.name, base)
        logits = trainer.train(case, base, adapter)
        np.save(DATA / program / f"{case}.npy", logits.float().numpy())


if __name__ == "__main__":
    make(sys.argv[1])
