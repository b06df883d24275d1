"""Leaves the soak out where memory cannot be measured: its meter is glibc's."""

try:
    import soak.meter  # noqa: F401
except ImportError:
    collect_ignore = ["test_soak.py"]
