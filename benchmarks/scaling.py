"""How the time of a search grows with sites, rows, channels and groups: a table, fitted slopes and a figure.

    python -m benchmarks.scaling [--threads N] [--image FILE.png] [--out]

Slopes are of log seconds against log size: 1 is linear, 2 quadratic, 0 flat. One thing is varied at a time; everything else is as by
default. Sites are those of LLaMA-shaped models of growing depth, searched one after the other as in a run. The figure is drawn by
plotly and photographed with a headless Chromium; without one only the table is made.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from alphasmith.objectives.quantization.scheme import Scheme
from benchmarks.layers import REPORTING_SEEDS, Size, layer_data, layers
from benchmarks.llama import llama, token_batches
from benchmarks.searching import searched, settings, thinned
from benchmarks.shared_sites import model_sites
from benchmarks.timing import machine, median, parser, publish, seconds_of, table, torch_threads, with_threads

SCHEME = Scheme.parse("w8a8-channel-static")
IMAGE = Path("docs/images/scaling_search.png")
_REPEATS = 3


@dataclass(frozen=True)
class Series:
    """One quantity varied: sizes, median seconds of the search, seconds of one fp32 product where it has one."""

    name: str
    expected: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    products: tuple[float, ...] = ()

    @property
    def slope(self) -> float:
        """Fitted exponent."""
        return slope(self.sizes, self.seconds)


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of a straight line through log seconds over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def of_layer(size: Size, k: int = 4) -> tuple[float, float]:
    """Median seconds of a search of one layer, and of its fp32 product."""
    (layer,) = layers(REPORTING_SEEDS[0], ("correlated",), size=size)
    data, fresh = layer_data(layer)
    held_out, config = thinned(fresh, 3), settings(groups={"k": k})
    taken = [searched(data, held_out, SCHEME, config).seconds for _ in range(_REPEATS)]
    return median(taken), seconds_of(lambda: layer.x @ layer.w.mT, _REPEATS)


def by_size(name: str, expected: str, sizes: dict[int, Size]) -> Series:
    """A series over layers of given sizes."""
    found = [of_layer(size) for size in sizes.values()]
    return Series(name, expected, tuple(sizes), tuple(s for s, _ in found), tuple(p for _, p in found))


def by_sites(depths: Sequence[int]) -> Series:
    """A series over models of growing depth."""
    sizes, seconds = [], []
    for depth in depths:
        sites = model_sites(llama(hidden=128, layers=depth), list(token_batches(16)))
        start = time.perf_counter()
        for site in sites:
            searched(site.data, site.held_out, SCHEME, settings(), shiftable=site.shiftable)
        sizes.append(len(sites))
        seconds.append(time.perf_counter() - start)
    return Series("sites of a model", "1", tuple(sizes), tuple(seconds))


def measure() -> list[Series]:
    """All series."""
    return [
        by_sites((1, 2, 4, 8)),
        by_size("rows T (768 x 768)", "below 1", {t: Size(t, 768, 768) for t in (512, 1024, 2048, 4096, 8192)}),
        by_size("channels C = O (T = 2048)", "at most 2", {c: Size(2048, c, c) for c in (192, 384, 768, 1536)}),
        Series(
            "groups K (768 x 768, T = 2048)",
            "near 0",
            (1, 2, 4, 8, 16),
            tuple(of_layer(Size(2048, 768, 768), k)[0] for k in (1, 2, 4, 8, 16)),
        ),
    ]


def row(series: Series) -> tuple[str, ...]:
    """One line of the table."""
    points = ", ".join(f"{n}: {s:.3g} s" for n, s in zip(series.sizes, series.seconds, strict=True))
    product = f"{slope(series.sizes, series.products):.2f}" if series.products else ""
    return series.name, points, f"{series.slope:.2f}", series.expected, product


def figure(every: Sequence[Series]) -> go.Figure:
    """One panel per series, double logarithmic, with the fitted line."""
    titles = [f"{s.name}<br>slope {s.slope:.2f}" for s in every]
    made = make_subplots(rows=1, cols=len(every), subplot_titles=titles)
    for column, series in enumerate(every, 1):
        fit = np.polyfit(np.log(series.sizes), np.log(series.seconds), 1)
        line = np.exp(np.polyval(fit, np.log(series.sizes)))
        made.add_scatter(
            x=series.sizes, y=line, mode="lines", line={"color": "#9aa5b1", "dash": "dash"}, row=1, col=column
        )
        made.add_scatter(
            x=series.sizes, y=series.seconds, mode="markers", marker={"color": "#1f6feb", "size": 9}, row=1, col=column
        )
        sizes = [str(n) for n in series.sizes]
        made.update_xaxes(type="log", tickvals=series.sizes, ticktext=sizes, row=1, col=column)
    # One scale for all panels, so that flat looks flat.
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10]
    made.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks], range=[-1.2, 1])
    made.update_yaxes(title="seconds of the search", row=1, col=1)
    made.update_layout(template="plotly_white", showlegend=False, width=1280, height=380, margin={"t": 70, "b": 40})
    return made


def photograph(made: go.Figure, image: Path) -> bool:
    """Save a figure as PNG of the size that its layout has; False where there is no Chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        made.write_html(page, include_plotlyjs=True, config={"staticPlot": True})
        page.write_text(page.read_text(encoding="utf-8").replace("<body>", '<body style="margin:0">'), encoding="utf-8")
        size = f"--window-size={made.layout.width:.0f},{made.layout.height:.0f}"
        arguments = ["--headless", "--no-sandbox", "--hide-scrollbars", size]
        subprocess.run(
            [browser, *arguments, "--virtual-time-budget=5000", f"--screenshot={image.resolve()}", page.as_uri()],
            check=True,
            capture_output=True,
        )
    return True


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    arguments_of.add_argument("--image", type=Path, default=IMAGE)
    arguments = arguments_of.parse_args()
    with torch_threads(arguments.threads):
        where = machine()
        every = measure()
    header = ("varied", "seconds of the search", "slope", "expected", "slope of one fp32 product")
    if not photograph(figure(every), arguments.image):
        print("no chromium: the figure was not drawn")
    publish("SCALING", f"{where} Scheme {SCHEME.name}.\n\n{table(header, [row(s) for s in every])}", arguments.out)


if __name__ == "__main__":
    main()
