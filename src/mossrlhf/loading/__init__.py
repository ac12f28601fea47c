"""Load the models of PPO from objects, folders, hub names or defaults."""
