"""How idle threads wait: asleep on the command line and in workers, as told where somebody told them, as ever in a library."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from alphasmith.search.idle_threads import passive_waiting

NAMES = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT")
#: Runs a command in the way the console script does, then prints what the environment says and whether torch was there too early.
COMMAND = """
import atexit, json, os, sys
from alphasmith.search.cli.main import main
early = "torch" in sys.modules
atexit.register(lambda: print(json.dumps([os.environ.get("OMP_WAIT_POLICY"), early])))
sys.argv = ["alphasmith", "--version"]
main({arguments})
"""


@pytest.mark.parametrize("name", NAMES)
def test_whoever_set_one_of_them_has_decided(name: str) -> None:
    assert passive_waiting({name: "1"}) == {}
    assert passive_waiting({})["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [("", None, "passive"), ("", "active", "active"), ("['--version']", None, None)],
    ids=["command", "told", "called by a program"],
)
def test_the_command_settles_it_before_torch_is_there(arguments: str, given: str | None, expected: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    script = COMMAND.replace("{arguments}", arguments)
    told = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert json.loads(told.stdout.splitlines()[-1]) == [expected, False]


def test_importing_the_library_changes_no_environment() -> None:
    script = "import os; before = dict(os.environ); import alphasmith.search.config, alphasmith.search.idle_threads; assert before == dict(os.environ)"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
