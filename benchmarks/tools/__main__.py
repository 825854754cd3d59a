"""Alphasmith against other tools on real models: every tool with its own code and defaults, one evaluator.

    python -m benchmarks.tools [--models MiniLM SmolLM2 ...] [--tools NAME ...] [--scheme w8a8-channel-static] [--seed 0] [--short]
                               [--without-run] [--resume | --tables] [--check] [--environments FOLDER] [--home FOLDER] [--work FOLDER]
                               [--patience SECONDS] [--threads N] [--out [docs/other_tools.md]]

Each tool is installed into an environment of its own (``benchmarks/tools/requirements``); one that does not install, breaks down or
cannot smooth a model is a row that says so. All get the samples that the run is given. Their scales are judged as those of the run
are, on data that nobody saw (see benchmarks/real_models.py, whose findings are taken or made). ``--resume`` takes findings and replies
that are in ``--work``, and ``--tables`` the comparisons that were made with them: it runs nothing. ``--check`` fails where a contestant is
below Alphasmith by more than the paired standard error on more than one model in four.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.real_folders import PACKAGES, AbsentError, home_folder
from benchmarks.real_runs import Request
from benchmarks.timing import publish
from benchmarks.tools.catalogue import TOOLS
from benchmarks.tools.comparing import Setting, compared, kept
from benchmarks.tools.environments import environments_folder
from benchmarks.tools.tables import Comparison, text, verdict

_ROOT = Path(__file__).resolve().parents[2]
_DOCUMENT = _ROOT / "docs/other_tools.md"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models, names = [p.name for p in PACKAGES], [t.name for t in TOOLS]
    build = _ROOT / "build"
    parser.add_argument("--models", nargs="*", default=models, choices=models)
    parser.add_argument("--tools", nargs="*", default=names, choices=names)
    parser.add_argument("--scheme", default="w8a8-channel-static")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--without-run", action="store_true", help="judge the tools alone, without the run of Alphasmith"
    )
    parser.add_argument("--tables", action="store_true", help="run nothing: the comparisons that are in --work")
    parser.add_argument("--short", action="store_true", help="less data to calibrate and to judge on")
    parser.add_argument("--resume", action="store_true", help="take the findings and replies that are in --work")
    parser.add_argument(
        "--check", action="store_true", help="fail where a contestant is better on more than one model in four"
    )
    parser.add_argument("--environments", type=Path, default=environments_folder(), help="where tools are installed")
    parser.add_argument("--home", type=Path, default=home_folder(), help="where packages and model folders are kept")
    parser.add_argument("--work", type=Path, default=build / "real_models", help="where findings and replies are kept")
    parser.add_argument("--patience", type=float, default=7200.0, help="seconds that a tool may take on a model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=Path, nargs="?", const=_DOCUMENT, help="document; alone: docs/other_tools.md")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    setting = Setting(
        environments=arguments.environments.resolve(),
        work=arguments.work.resolve(),
        threads=arguments.threads,
        resume=arguments.resume,
        patience=arguments.patience,
        with_run=not arguments.without_run,
    )
    tools = tuple(tool for tool in TOOLS if tool.name in arguments.tools)
    comparisons: list[Comparison] = []
    left_out: list[str] = []
    for model in arguments.models:
        request = Request(
            model=model,
            scheme=arguments.scheme,
            seed=arguments.seed,
            short=arguments.short,
            sweep=False,
            home=arguments.home.resolve(),
        )
        try:
            comparison = kept(request, setting.work) if arguments.tables else compared(request, tools, setting)
        except (AbsentError, RuntimeError) as error:
            left_out.append(str(error))
        else:
            comparisons.append(comparison)
            print(verdict(comparison), flush=True)
    if not comparisons:
        print("nothing was run: " + "; ".join(left_out))
        return 1
    publish("TOOLS", text(comparisons, left_out), arguments.out)
    better = sum(any(comparison.better()) for comparison in comparisons)
    return int(arguments.check and better > len(comparisons) / 4)


if __name__ == "__main__":
    sys.exit(main())
