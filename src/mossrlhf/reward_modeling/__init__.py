"""Reward models: training on preference pairs, evaluation, strength of preferences."""
