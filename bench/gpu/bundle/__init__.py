"""`make gpu-bundle`: prepares files for `make gpu` on a machine without a card.

    contents.py    the names of a bundle's files, and its limits
    __main__.py    makes a bundle
    pretended.py   a simulated card: kernels are compiled for it, but do not run
    warm.py        compiles everything that `make gpu` launches into Triton's cache
    plugin.py      the same for the tests, as a plugin of pytest

Time on a card is expensive, and its machine may have no network. With the same Python, torch and
Triton, the extension, Triton's cache and the wheels of peers are the same files there.
"""
