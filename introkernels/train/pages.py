"""Pages made from templates, and figures as files and as part of a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from introkernels.train import files
from introkernels.train.findings import readable


def template(name: str) -> jinja2.Template:
    """A template of this package; what it shows is escaped where its name speaks of HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("introkernels.train"),
        autoescape=".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["readable"] = readable
    return environment.get_template(name)


def save_figure(figure: Figure, path: Path) -> str:
    """Write a figure as a PNG file; its address for a page that holds the picture itself."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    files.write_bytes(path, png.getvalue())
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
