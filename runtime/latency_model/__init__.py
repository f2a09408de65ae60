"""The latency of any structure from a few dozen engines: blocks, staircases, single layers, training, the model.

Imports `onnx`, `timing`, `backends` and `measuring`.
"""
