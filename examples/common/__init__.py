"""What several examples use: the model, the token files, the ranks, the log and the checkpoints."""
