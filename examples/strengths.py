"""Two adapters in one base at several strengths: how much the weights change, as the receipts tell it.

    python examples/strengths.py base/ adapter/ style/ out/

writes out/0.0/ to out/1.0/: the first adapter whole, the second at a growing strength.
"""

import math
import sys
from pathlib import Path

import loratools


def change(receipt: dict) -> float:
    """The greatest ‖W′ − W‖ / ‖W‖ of any tensor that the merge changed."""
    return max((row["relative_norm"] for row in receipt["tensors"] if row["relative_norm"] is not None), default=math.nan)


def main(base: str, adapter: str, style: str, out: str) -> None:
    for strength in (0.0, 0.5, 1.0):
        receipt = loratools.merge(base, [adapter, f"{style}:{strength}"], Path(out, str(strength)))
        print(f"{style} at {strength}: applied {receipt['applied']} of {receipt['expected']}, largest change {change(receipt):.3f}")
        for note in receipt["notes"]:
            print(f"  {note}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
