"""Weights published as differences from raw ones: `make_diff`, and `recover`."""

from mossrlhf.weight_diff.diff import CHECKSUMS, DiffError, make_diff, recover

__all__ = ["CHECKSUMS", "DiffError", "make_diff", "recover"]

CHECK_SUMS = CHECKSUMS  # the old name
