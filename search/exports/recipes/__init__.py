"""Recipes: short scripts that give ``smoothed/`` to another tool's own quantizer, with that tool's smoothing switched off.

- ``_ctranslate2``: CTranslate2, whose converter reads ``smoothed/`` as it is
- ``_facts``: what a recipe is made from, and what no tool but ours can do
- ``_llm_compressor``: llm-compressor, its weights with our static input scales
- ``_modelopt``: ModelOpt, with our static input scales and divisions at run time
- ``_neural_compressor``: Neural Compressor without Intel's extension for PyTorch
- ``_script``: the lines that all recipes share
- ``_torchao``: torchao, with our static input scales and divisions at run time
- ``recipe``: ``alphasmith recipe``: the script for a tool
"""

__all__ = ["recipe"]
