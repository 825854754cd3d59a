"""A model that is larger than memory: its repeated blocks, one at a time, as models of their own.

- ``_chain``: the repeated blocks of a model, found by structure, and whether they are a chain
- ``_others``: what a block is called with beside the hidden state, as tensors and what is around them
- ``parts``: a block as a model of its own, with the names that its tensors have in the whole one; the rest likewise
- ``stored_weights``: the tensors of a folder, read one at a time
- ``streamed_model``: a model in a folder of which one part at a time is in memory
"""

__all__ = ["parts", "stored_weights", "streamed_model"]
