"""Mutation testing: single lines are broken on purpose, and named tests must fail.

`lists` has the mutants by area; `trial.py` runs one of them in a copy of the tree. A mutant that
survives shows a line whose value no test states. `make mutants` runs all of them.
"""
