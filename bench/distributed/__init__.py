"""Losses across processes, on one machine with gloo: `python -m bench distributed`.

cases.py      the cases: losses, ranks, shapes; each rank's part of the inputs
methods.py    the methods: open_clip's losses, and this library's with an all-gather or a ring
processes.py  starts a group of processes that run a function together
preload.py    the imports of the server that these processes are forked from
rank.py       the measurements on each rank: times, bytes sent, errors, peak memory
check.py      the predictions of `bench/scale/model.py` for this machine
row.py        the columns of the CSV
runner.py     measures a plan case by case and writes the CSV of this machine
table.py      that CSV as tables
"""
