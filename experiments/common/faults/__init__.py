"""What can go wrong with checkpoints and runs, one kind a file."""
