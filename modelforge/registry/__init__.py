"""Bundles in OCI registries: push, pull, list, tag. Light: no numpy, no graph, no compilers."""
