"""Step time and memory across many GPUs, by arithmetic."""
