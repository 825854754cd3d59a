"""ONNX models that compute with the integers of a result.

- ``_codes``: integer weights and scales as initializers of a graph, and back
- ``convolutions``: integer convolutions as nodes of a graph
- ``_examples``: inputs that a model is traced with
- ``_graph``: nodes and initializers put into a traced graph
- ``_guards``: the one place that touches private names of ``torch.export``
- ``_layouts``: which schemes a layout holds
- ``_parts``: the graphs that a model becomes: one, or those that write text token by token
- ``_products``: integer products of linear operators as nodes of a graph
- ``rewriting``: marked operators of a traced graph in the nodes of a layout
- ``_rounded_sums``: sums of convolutions that are rounded anyway, rounded where runtimes look for it
- ``_tracing``: a model as a graph in which every quantized operator is marked
- ``models``: the files of an export
- ``reading``: the operators of an exported graph
"""

__all__ = ["models", "reading"]
