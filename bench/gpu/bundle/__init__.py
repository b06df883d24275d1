"""`make gpu-bundle`: what `make gpu` can have before it starts, made on a machine without a card.

    contents.py    what a bundle consists of
    __main__.py    makes one
    pretended.py   a card that compiles and does not run
    warm.py        everything that `make gpu` launches, on that card: fills Triton's cache
    plugin.py      the same for the tests, as a plugin of pytest

A card's minutes are dear and its machine may have no network. The extension, Triton's cache and the
wheels of peers are the same files there, given the same Python, torch and Triton.
"""
