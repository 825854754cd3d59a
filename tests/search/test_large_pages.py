"""Pages of large tensors: asked for on the command line and in workers, as told where somebody told them, as ever in a library."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from alphasmith.search.large_pages import large_pages

NAME = "THP_MEM_ALLOC_ENABLE"
#: Runs a command in the way the console script does, then prints what the environment says and whether torch was there too early.
COMMAND = f"""
import atexit, json, os, sys
from alphasmith.search.cli.main import main
early = "torch" in sys.modules
atexit.register(lambda: print(json.dumps([os.environ.get("{NAME}"), early])))
sys.argv = ["alphasmith", "--version"]
main(ARGUMENTS)
"""


def test_whoever_set_it_has_decided() -> None:
    assert large_pages({NAME: "0"}) == {}
    assert large_pages({}) == {NAME: "1"}


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [("", None, "1"), ("", "0", "0"), ("['--version']", None, None)],
    ids=["command", "told", "called by a program"],
)
def test_the_command_settles_it_before_torch_is_there(arguments: str, given: str | None, expected: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != NAME}
    environment |= {} if given is None else {NAME: given}
    script = COMMAND.replace("ARGUMENTS", arguments)
    told = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert json.loads(told.stdout.splitlines()[-1]) == [expected, False]
