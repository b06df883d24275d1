"""Runs the demo, which trains a small CLIP on emoji: `python -m fastclip.train --help`."""

from .demo.train import main

if __name__ == "__main__":
    main()
