"""What is done with a trained detector."""
