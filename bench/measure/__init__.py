"""Time, memory, traffic and error of a method on a case."""
