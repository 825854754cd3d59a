"""The model of rounding noise, its optimum, the limit per channel.

- ``_closed_form``: the noise of one rounding in closed form: smooth in the logarithms of the scales
- ``_descent``: minimum of a smooth function in a box from several starts at once: projected L-BFGS
- ``_rounding``: rounding of one tensor of a site: sampled entries, their steps
- ``_saturation``: what products that saturate add to the loss of a site, on a few rows and outputs
- ``channel_limit``: the per-channel limit of a site: how low its loss goes when every channel has its own scale
- ``model``: the rounding-noise model: what the exact judge would say of scales, without a product of the site's size
"""

__all__ = ["channel_limit", "model"]
