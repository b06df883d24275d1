"""The host, and the versions of it that are known."""

from ..host import Host

HOST = Host("lightly", ("1.6",))
