"""How figures look: one style and one palette for all of them, and SVG that can be committed."""

from __future__ import annotations

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": "#3b424c",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.grid.axis": "y",
    "grid.color": "#e6e8ec",
    "grid.linewidth": 0.8,
    "text.color": "#1c2027",
    "xtick.color": "#59616d",
    "ytick.color": "#59616d",
    "savefig.dpi": 180,
}
# Okabe and Ito's palette, which readers of every colour vision can tell apart.
COLOURS = ("#6b7280", "#e69f00", "#009e73", "#56b4e9", "#0072b2", "#cc79a7", "#d55e00")


def styled() -> Any:
    """Context in which figures must be made and saved."""
    return rc_context(STYLE)


def svg(figure: Figure) -> str:
    """The figure as SVG: the same text for the same figure, fonts and version of matplotlib."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "introkernels"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
