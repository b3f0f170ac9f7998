"""Draw what history costs against how much there is of it, from benchmarks/history.py's figures.

python -m benchmarks.history_chart results.json docs/history.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

SHOWN = (
    "accept + finish",
    "get",
    "first page, all",
    "1,000th page, all",
    "last page",
    "last page, OFFSET",
    "search, rare word",
    "search, word in 5 %",
    "statistics, 30 days",
    "statistics, 30 days, by user",
)


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """A panel for each database, a line for each operation; both axes logarithmic."""
    kinds = list(dict.fromkeys(result["database"] for result in results))
    figure, panels = plt.subplots(
        1, len(kinds), sharey=True, figsize=(4 * len(kinds) + 3, 4.5), layout="constrained"
    )
    for panel, kind in zip([panels] if len(kinds) == 1 else panels, kinds, strict=True):
        of_kind = [result for result in results if result["database"] == kind]
        for name in SHOWN:
            points = [(r["rows"], r["ms"][name]["p50"]) for r in of_kind if name in r["ms"]]
            style = "--" if "OFFSET" in name else "-"
            panel.plot(*zip(*points, strict=True), style, marker="o", label=name)
        panel.set(title=kind, xlabel="records", xscale="log", yscale="log")
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("milliseconds, p50")
    names = figure.axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside right center", fontsize="small")
    figure.savefig(file)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
