"""What makes the model faster (the same results, to rounding) or smaller (weights rounded to 8 or 4 bits).

`swap.py` replaces layers of a finished model; start there. `rounding.py`, `rounded_layers.py`, `fast_layers.py` and
`decoder_layers.py` are the replacements. `kernels.py`, `library.py` and the C++ files compute them, `products.py` where
there is no kernel. `offload.py` is for models larger than their device.
"""
