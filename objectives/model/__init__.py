"""The float model: loading, recurrent layers, task metrics.

- ``_attention``: ``nn.MultiheadAttention`` as linear operators
- ``_parametrizations``: weights that are computed from other tensors at every forward pass, baked into plain ones
- ``_recurrent``: recurrent layers as linear operators
- ``decoding``: what the decoder of an encoder-decoder reads
- ``factory``: the user's own functions: a model factory, calibration batches and a task metric
- ``hf_folder``: reading a Hugging Face folder: what must be there, what is refused, and which class loads it
- ``labels``: labels of data as the classes of a model
- ``loading``: loading of models: a Hugging Face folder, the user's factory, or a module from a launch script
- ``metrics``: task metrics that need nothing but a model and its batches
- ``modules``: modules of a model: the one of an operator, the weight that one owns, and another in its place
- ``plain_operators``: a model of plain operators in place of the user's, and the way back to the user's tensors
- ``private_copy``: a private copy of the user's module, without what wraps it: compilers and parallel runners
- ``stored_names``: what a checkpoint of transformers calls the parameters of a model, which classes refuse quantized ones
"""

__all__ = [
    "decoding",
    "factory",
    "hf_folder",
    "labels",
    "loading",
    "metrics",
    "modules",
    "plain_operators",
    "private_copy",
    "stored_names",
]
