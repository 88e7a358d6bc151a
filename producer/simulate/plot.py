"""A picture of compared strategies; needs matplotlib (the extra `plot`), which nothing else here imports."""

from collections.abc import Sequence
from pathlib import Path

from producer.simulate.sweep import Compared


def check_plotting(path: Path) -> None:
    """Raise what saving a plot there would: `ImportError`, with what to do, where matplotlib is missing, `ValueError` for the path."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'millrace[plot]', or ask for none with --no-plot") from error
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix[1:].lower() not in (known := FigureCanvasBase.get_supported_filetypes()):
        raise ValueError(f"plot={str(path)!r} names no format that is known; let its name end in one of {', '.join(sorted(known))}")
    if path.is_dir():
        raise ValueError(f"plot={str(path)!r} is a folder; give a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"plot={str(path)!r} cannot be saved: {str(path.parent)!r} is no folder")


def plot(rows: Sequence[Compared], path: Path, names: Sequence[str] | None = None) -> None:
    """Save a picture of speed-up, utilisation, staleness, waste and bias; its format follows the name's ending.

    Args:
        rows: one bar each.
        path: where to.
        names: of the rows; None: the strategies with their options.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the name's ending is no format, or it lies in no folder.
    """
    check_plotting(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [str(row.choice) for row in rows] if names is None else list(names)
    panels = [
        ("speed-up over sync", [row.speed_up for row in rows]),
        ("utilisation", [row.outcome.utilisation for row in rows]),
        ("staleness, mean", [row.outcome.mean_staleness for row in rows]),
        ("wasted tokens, %", [100 * row.outcome.wasted for row in rows]),
        ("length bias, %", [100 * (row.outcome.length_bias or 0.0) for row in rows]),
        ("coverage bias, %", [100 * (row.outcome.coverage_bias or 0.0) for row in rows]),
    ]
    figure = Figure(figsize=(2.2 * len(panels) + 3, 0.45 * len(rows) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, values) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        bars = axes.barh(names, values)
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.savefig(path)
