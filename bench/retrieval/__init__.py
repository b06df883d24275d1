"""Retrieval functions beside what they replace, on normalised features of random numbers."""
