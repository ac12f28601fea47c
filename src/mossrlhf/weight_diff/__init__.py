"""Weights published as differences from raw ones: `make_diff`, and `recover`."""

from mossrlhf.weight_diff.diff import CHECK_SUMS, DiffError, make_diff, recover

__all__ = ["CHECK_SUMS", "DiffError", "make_diff", "recover"]
