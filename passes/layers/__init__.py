"""One convolution or linear layer by itself: as a product, with the norm behind it, as a sequence of smaller ones (`forms/`).

Imports `tracing`.
"""
