"""Other tools on real models: each chooses scales with its own code in an environment of its own, one evaluator scores them.

``catalogue``: the tools, their versions and settings. ``environments``: a virtual environment for each. ``exchange``: requests to
adapters, and their replies, read with distrust. ``adapters``: one script per tool, which runs in the tool's environment. ``scoring``:
scales of linears as smoothings of our sites, and the loss at the output. ``comparing``: all contestants on one model. ``tables``: the
rows. ``python -m benchmarks.tools`` does it all.
"""
