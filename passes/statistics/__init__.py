"""What layers see on some images: calibration data, a network run part by part, moments of patches, the original beside it.

Imports `tracing`, `layers`, `channels` and `transforms`.
"""
