"""Losses as formulas of line statistics. Each is written once, for one process and for ranks.

`world.py` is what differs between the two. `fastclip.loss` and `fastclip.distributed` have the
public functions.
"""
