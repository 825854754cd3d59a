"""The figure of docs/a_run.md: losses of every site of a run, as its report draws them.

    alphasmith run --demo image --set search.refine=false --out RUN
    python -m benchmarks.site_losses RUN [--image docs/images/site_losses.png]

Without the refinement at the output, so that the alphas of every site are those that its own search found. The picture is made by a
headless Chromium; without one nothing is drawn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from alphasmith.dashboards.figures.sites import losses_by_site
from alphasmith.storage.output.manifest import Manifest
from alphasmith.storage.runs.data_frames import sites_frame
from benchmarks.scaling import photograph

IMAGE = Path("docs/images/site_losses.png")
_WIDTH = 1100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that a run wrote")
    parser.add_argument("--image", type=Path, default=IMAGE)
    arguments = parser.parse_args()
    manifest = Manifest.model_validate_json((arguments.run / "manifest.json").read_text(encoding="utf-8"))
    figure = losses_by_site(sites_frame(manifest.sites))
    figure.update_layout(width=_WIDTH)
    if not photograph(figure, arguments.image):
        print("no chromium: the figure was not drawn", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
