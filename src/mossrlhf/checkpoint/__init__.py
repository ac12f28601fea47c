"""Checkpoints: save a run, resume it, list and prune folders."""
