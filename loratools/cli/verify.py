"""loratools verify: an output against its receipt, against the merge again, and against the layers."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import say, say_json


@click.command()
@click.argument("path")
@click.option("--base", metavar="BASE", help="The base it was merged from: the merge is replayed, tensor by tensor.")
@click.option("--adapter", "adapters", multiple=True, metavar="ADAPTER[:STRENGTH]", help="An adapter that was merged; may be repeated.")
@click.option("--forward", is_flag=True, help="Run base and adapter as torch layers beside the merged weights, on random inputs.")
@options.device
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the random inputs.")
@options.together(options.threads, options.as_json)
def command(path: str, as_json: bool, **words: Any) -> int:
    """Check an output against its receipt, and against the merge itself.

    Recomputes the digest of every tensor and file that the receipt names. With --base and --adapter the merge is done again
    in memory and compared bit by bit; what another tool merged is told in units in the last place. Exit code 1 on any fault.

    \b
      loratools verify merged/
      loratools verify merged/ --base model/ --adapter adapter/ --adapter style/:0.5
      loratools verify merged/ --base model/ --adapter adapter/ --forward --device cuda
    """
    from loratools.ops.verify import verify

    report = verify(path, **words)
    if as_json:
        say_json(report)
    else:
        say(_lines(report))
        for fault in report["faults"][:10]:
            click.echo(f"Error: {fault}", err=True)
        if len(report["faults"]) > 10:
            click.echo(f"Error: … and {len(report['faults']) - 10} more faults", err=True)
    return 0 if report["ok"] else 1


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [f"verify {report['path']}"]
    if report["digests"]:
        lines.append(f"  digests   {report['digests']} tensors recomputed")
    if report["replayed"]:
        apart = f"{report['differing']} weights differ, by up to {report['max_ulp']} ulp" if report["differing"] else "the same bits"
        lines.append(f"  replayed  {report['replayed']} tensors: {apart}")
    checked = [row["ratio"] for row in report["forward"] if row["ratio"] is not None]
    if report["forward"]:
        worst = f"largest error {max(checked) ** 0.5:.2f} of the rounding bound" if checked else "none has a layer"
        lines.append(f"  forward   {len(checked)} of {len(report['forward'])} weights: {worst}")
        lines += [f"            {row['name']}: {row['skipped']}" for row in report["forward"] if "skipped" in row]
    lines.append("  ok" if report["ok"] else f"  {len(report['faults'])} faults")
    return lines
