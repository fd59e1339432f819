"""What measures, compares and times the project: python -m experiments.NAME, from the clone."""
