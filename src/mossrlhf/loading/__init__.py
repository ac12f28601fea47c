"""The models of PPO from what a user passes: objects, folders, hub names or nothing."""
