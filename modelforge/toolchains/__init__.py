"""Vendor software and the child processes that it runs in. Knows no model, no recipe and no compiler of ours."""
