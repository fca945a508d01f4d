"""TensorRT and TensorRT-RTX: one driver (``driver.py``), two toolchains; what differs is a table (``product.py``).

Empty on purpose: the child processes that load NVIDIA's code import from here, and start fast.
"""
