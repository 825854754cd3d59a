from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import alphasmith.dashboards


def test_no_room_of_the_dashboards_loads_torch() -> None:
    top = Path(str(alphasmith.dashboards.__file__)).parent
    files = [file.relative_to(top).with_suffix("").parts for file in top.rglob("*.py") if file.stem != "__init__"]
    rooms = sorted(".".join(parts) for parts in files)
    assert {"figures.sites", "report", "server", "study_views"} <= set(rooms)
    imports = "\n".join(f"import alphasmith.dashboards.{room}" for room in rooms)
    check = "import sys\nprint(sorted(set(sys.modules) & {'torch', 'transformers', 'ray'}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{imports}\n{check}"], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
