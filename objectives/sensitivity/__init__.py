"""What the model's output feels of the error of a site, a row, an output: gradients of random projections.

- ``_checkpoints``: blocks of a model that a backward pass computes again instead of keeping them
- ``_gradients``: gradients of random projections of the output at the outputs of its operators
- ``_graph_memory``: memory that a backward pass needs, and ways to keep within it
- ``multiply_adds``: what a forward call of the model does in the operators of every site
- ``output_shares``: what every site adds to the error of the model's output, predicted from gradients and measured
- ``rival_contributions``: what sites would add to that error under several smoothings
- ``row_weights``: what an error in a row and at an output of a site counts at the model's output
"""

__all__ = ["multiply_adds", "output_shares", "rival_contributions", "row_weights"]
