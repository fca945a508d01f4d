"""From samples to ranges, and from ranges to quantized models."""
