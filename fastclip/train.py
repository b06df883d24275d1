"""Trains a small CLIP on emoji and reports what it learnt: `python -m fastclip.train --help`."""

from .demo.train import main

if __name__ == "__main__":
    main()
