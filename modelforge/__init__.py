"""ModelForge: one ONNX model in; one versioned bundle out, compiled and checked for every target."""

__version__ = "0.1.0"
