"""What was compiled, as a checkpoint that other programs load."""
