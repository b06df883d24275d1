"""The engines: operators that go over all pairs of a block of logits, the autograd Functions and
checks around them, and the choice of an engine."""
