"""What a user steps; no arithmetic."""
