"""Accuracy: what a variant gives, held against the FP32 model in ONNX Runtime on the same data."""
