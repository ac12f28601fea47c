"""Checkpoints: save, resume, list."""
