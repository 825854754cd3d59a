"""``python -m alphasmith.search.cli``."""

from __future__ import annotations

from alphasmith.search.cli.main import main

if __name__ == "__main__":
    main()
