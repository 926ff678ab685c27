"""The optimizers that a user steps. They do no arithmetic."""
