"""What is deployed: schemes, quantizers, integer operators, their files.

- ``_integer_linear``: a linear layer whose product is taken between integers, with all that does not depend on its input made once
- ``candidate_model``: one model that becomes candidate after candidate, in place, and the float model again
- ``formats``: formats of sites by name, which are dearer than others, and what a target serves
- ``integer_product``: exact products of 8-bit integer matrices: on integer units where they pay, else in float32, the same to the bit
- ``operator``: one linear or convolution that computes in the deployed number format
- ``payload``: a quantized model as plain tensors and a JSON-able description, and back, bit for bit
- ``plan``: the plan of a quantization: which tensors it changes, from which sites' smoothings
- ``quantizers``: symmetric abs-max quantization of weights and activations: formula fA4, its one home
- ``saturating_pairs``: what products of u8 x s8 lose that are added two by two in 16 bits with saturation
- ``scheme``: quantization schemes: bits and granularity of weights and activations (claim A-12)
- ``site_schemes``: the schemes of a model site by site: one for all, and others for the sites that are named
- ``stack``: several matrices in one tensor, such as the experts of a mixture, kept quantized
- ``stored_forms``: operators in other formats, stored beside a quantized model and exchanged without the float one
- ``unseen_rows``: clipping of rows that nobody has seen: what the rows that set a static range cannot show of its error
"""

__all__ = [
    "candidate_model",
    "formats",
    "integer_product",
    "operator",
    "payload",
    "plan",
    "quantizers",
    "saturating_pairs",
    "scheme",
    "site_schemes",
    "stack",
    "stored_forms",
    "unseen_rows",
]
