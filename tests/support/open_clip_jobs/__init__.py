"""Runs of open_clip's trainer on emoji pairs, with its own losses and patched.

`python -m support.open_clip_jobs FOLDER ARM JOB ...`, or the same under torchrun, runs jobs and
writes what they found to FOLDER.
"""
