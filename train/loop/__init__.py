"""Make one run: training, its checkpoints, and what goes on beside it."""
