"""Engines that are handed on: the manifest beside each, and model repositories for Triton.

Imports `onnx`, `timing`, `backends` and `measuring`.
"""
