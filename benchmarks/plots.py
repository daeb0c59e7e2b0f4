"""Plots of benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def bars(groups: Mapping[str, Mapping[str, float]], *, path: str | Path, unit: str, title: str) -> None:
    """Horizontal bars, one for each value: groups one below the other, the same name in the same colour in all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure, axis = pyplot.subplots(figsize=(8, 1.2 + 0.35 * sum(map(len, groups.values())) + 0.2 * len(groups)))
    place, middles, shown = 0.0, [], set()
    for group in groups.values():
        middles.append(place + (len(group) - 1) / 2)
        for name, value in group.items():
            label = name if name not in shown else None
            bar = axis.barh(place, value, height=0.85, color=f"C{names.index(name) % 10}", label=label)
            axis.bar_label(bar, fmt="%.4g", padding=3, fontsize=8)
            shown.add(name)
            place += 1
        place += 0.7
    axis.set_yticks(middles, list(groups))
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    axis.set_title(title, fontsize=10, loc="left", pad=28)
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=min(5, len(names)), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
