"""The engine: whatever touches all pairs of a block, and what chooses the code that does it."""
