"""Training: objectives, the loop, weight averages, checkpoints, data."""
