"""The host, and the versions of it that are known."""

from ..host import Host

HOST = Host("pytorch_metric_learning", ("2.9",))
