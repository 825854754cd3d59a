"""What the float model does on data: statistics, rows, the data of a site.

- ``calibrate``: calibration in bounded memory: statistics of every channel and a fixed number of rows per site
- ``capture``: capture of operator inputs while a model runs, in bounded memory
- ``patches``: the patches a convolution multiplies with its weight, cut only where they are wanted
- ``producers``: the other side of a fold: quantized weights whose rows are divided by the scales of a site
- ``site_data``: the data of one site: all that scoring its scales needs, without the model
- ``site_layout``: how the rows and weights of a site lie in memory, by convolution group and by subset
- ``statistics``: statistics of a stream of rows in memory that does not grow with the stream
- ``tensor_state``: records as tensors and JSON, without pickle: every field comes back equal to the bit
- ``weight_matrix``: the matrix (O, D) that an operator multiplies with its rows, out of its weight as it is stored, and back
"""

__all__ = [
    "calibrate",
    "capture",
    "patches",
    "producers",
    "site_data",
    "site_layout",
    "statistics",
    "tensor_state",
    "weight_matrix",
]
