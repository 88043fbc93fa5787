"""Data sets, their checks and their evaluation."""
