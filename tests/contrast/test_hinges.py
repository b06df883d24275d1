"""Hinges of lines whose own positive key_bias takes out."""

import pytest
import torch
import torch.nn.functional as F

from fastclip import contrast

pytestmark = pytest.mark.usefixtures("on_the_device")


def test_a_line_without_its_own_positive_has_no_hinge(backend: str) -> None:
    """A level of minus infinity would put every pair infinitely far above it."""
    x, y = torch.randn(2, 6, 4, dtype=torch.float64).unbind()
    key_bias = torch.linspace(-1, 1, 6, dtype=torch.float64)
    key_bias[2] = -torch.inf
    c = contrast(x, y, 2.0, key_bias=key_bias, kind="hinge", above=-1.0, backend=backend)
    s = 2 * x @ y.T + key_bias
    own, others = s.diagonal(), ~torch.eye(6, dtype=torch.bool)
    rows = (F.relu(1 + s - own[:, None]).masked_fill(~others, 0)).sum(1)
    columns = (F.relu(1 + s - own).masked_fill(~others, 0)).sum(0)
    rows[2], columns[2] = 0, 0
    torch.testing.assert_close(torch.cat((c.rows, c.columns)), torch.cat((rows, columns)))
