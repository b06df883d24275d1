"""A model of step time and memory across many GPUs; nothing is measured."""
