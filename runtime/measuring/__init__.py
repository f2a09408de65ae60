"""The latency of graphs on a target: build, compare with PyTorch, then time; and the store that measurements outlive a run in.

Imports `onnx`, `timing` and `backends`.
"""
