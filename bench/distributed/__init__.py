"""Losses across processes, on one machine with gloo: `python -m bench distributed`.

cases.py      what is measured: losses, ranks, shapes; each rank's part of the inputs
methods.py    how: open_clip's losses, and this library's gathered and in a ring
processes.py  ranks that run a function together, in processes made for it
rank.py       what a rank does: times, bytes sent, errors, the peak of its memory
check.py      what `bench/scale/model.py` predicts for this machine
row.py        the columns of the CSV
runner.py     all of it, case by case, into the CSV of this machine
table.py      that CSV as tables
"""
