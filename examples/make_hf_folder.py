"""Write the text demo as a user would have it: a Hugging Face folder ``model`` and texts in ``media/text.jsonl``.

    python make_hf_folder.py [FOLDER]

The model is a small LLaMA-architecture language model with synthetic outlier channels; it is trained the first time (a
minute or so) and read from the user's cache afterwards. ``hf_folder.toml`` beside this script searches it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from alphasmith.objectives.demo import load_demo, write_hf_folder, write_media


def main(folder: Path) -> None:
    """Write ``folder/model`` and ``folder/media``."""
    demo = load_demo("text")
    print(demo.description)
    print(write_hf_folder(demo, folder / "model"))
    print(write_media(demo, folder / "media"))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
