"""Planted defects: real small artifacts, each spoiled in one way, and what finds it.

planting.py         what a defect is, and how one is planted in a copy
onnx.py, gguf.py, tflite.py     the defects of each format
__main__.py         `python -m benchmarks.defects`: a table of all, and JSON
"""
