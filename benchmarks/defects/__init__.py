"""Planted defects: real small artifacts, each spoiled in one way, and what finds it.

planting.py         what a defect is, and how one is planted in a copy
onnx_files.py, gguf_files.py, tflite_files.py     the defects of each format
__main__.py         `python -m benchmarks.defects`: a table of all, and JSON
"""

from __future__ import annotations

from benchmarks.defects import gguf_files, onnx_files, tflite_files

DEFECTS = (*onnx_files.DEFECTS, *gguf_files.DEFECTS, *tflite_files.DEFECTS)
