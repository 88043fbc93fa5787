"""Training: the parts of a run, its loop, checkpoints, resuming."""
