"""Tiny trainers and models."""

from tiny_trainer import build, make, parameters, policy, reward_model, world  # noqa: F401
