"""Weights published as differences from raw ones: made, and recovered."""

from mossrlhf.weight_diff.check_sums import CHECK_SUMS
from mossrlhf.weight_diff.fit import DiffError
from mossrlhf.weight_diff.making import make_diff, recover

__all__ = ["CHECK_SUMS", "DiffError", "make_diff", "recover"]
