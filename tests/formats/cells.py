"""What each format can say: a cell of the matrix in spec/formats/README.md, by encoding and decoding."""

from __future__ import annotations

from loratools.adapter import Adapter
from loratools.errors import Faults, LoratoolsError, NotExpressible
from loratools.formats import FORMATS, encode
from tests.formats.arrays import check_written
from tests.formats.matrix import check_alike, check_same
from tests.formats.places import adapter_of, read

NARROW = ("gguf",)  # whose alpha is a float32


def cell(kind: str, layer: str, format: str) -> str:
    """"yes", or "no: " and why; "written" of what can only be written; "yes*" where its alpha is rounded. Anything else is an error."""
    adapter = adapter_of(kind, layer, format)
    try:
        written = encode(adapter, format)
    except LoratoolsError as error:
        return f"no: {reason(error)}"
    if format == "trtllm":
        check_written(adapter, written)
        return "written"
    assert [one.name for one in FORMATS if one.detect(written)] == [format]
    once = read(written, format, adapter, layer)
    rounded = format in NARROW and scalings(once) != scalings(adapter)
    check_same(adapter, once, narrow=rounded)
    again = encode(once, format)
    check_same(once, read(again, format, adapter, layer))
    check_alike(written, again)
    return "yes*" if rounded else "yes"


def scalings(adapter: Adapter) -> list[object]:
    return [adapter[name].facts().get("scaling") for name in sorted(adapter)]


def reason(error: LoratoolsError) -> str:
    """What is not expressible and the way out; each fault must name its tensor and a way."""
    faults = error.errors if isinstance(error, Faults) else (error,)
    for fault in faults:
        assert isinstance(fault, NotExpressible), fault
        assert fault.tensor and fault.remedy, f"names no tensor, or no way: {fault}"
    return f"{faults[0].fact}; {faults[0].remedy}"
