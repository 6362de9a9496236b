"""What makes the model faster or smaller and changes no mathematics.

`swap.py` replaces layers of a finished model; start there. `rounding.py`, `rounded_layers.py`, `fast_layers.py` and
`decoder_layers.py` are the replacements. `kernels.py`, `library.py` and the C++ files compute them, `products.py` where
there is no kernel. `offload.py` is for models larger than their device.
"""
