"""Whole runs, from data to a picture: what ``mossrlhf demo`` and the examples consist of."""
