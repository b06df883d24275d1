"""A kind with levels: each line's sum is over its pairs above a number that the caller gives."""

import pytest
from support.level_cases import CHECKS

pytestmark = pytest.mark.usefixtures("on_the_device", "chunks_of_plain_pytorch")


@pytest.mark.parametrize("shape", [(70, 37), (37, 70)], ids=["tall", "wide"])
@pytest.mark.parametrize("check", CHECKS)
def test_levels(engine: str, check: str, shape: tuple[int, int]) -> None:
    CHECKS[check](engine, *shape)
