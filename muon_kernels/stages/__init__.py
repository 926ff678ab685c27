"""What may stand around the iteration."""
