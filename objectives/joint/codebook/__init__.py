"""Weights as a table of shared values and an index each.

- ``_compensation``: indices whose errors make up for each other on what a layer reads: formula fB12
- ``_entropy``: indices under a canonical Huffman code, in blocks that are read side by side
- ``_packing``: indices packed at a fixed number of bits
- ``_sorted``: weights in ascending order with running sums: means and errors of any interval at once
- ``clustering``: starts, Lloyd's iteration and the optimum on a line: formula fB8
- ``tensors``: weights as tables and indices: made, measured in bytes, stored and read back: formulas fB9, fB10
"""

__all__ = ["clustering", "tensors"]
