"""Every method that the benchmark compares."""
