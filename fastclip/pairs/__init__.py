"""Trains the thin CLIP on one's own image-text pairs: `python -m fastclip.train --pairs ...`.

`source.py` reads tables, folders and WebDataset tars; `docs/own-pairs.md` is the manual.
"""
