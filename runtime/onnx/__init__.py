"""Graphs as ONNX files: the export, many narrowed networks at the price of one export, lower precision.

Imports `compressor.passes`.
"""
