"""A test with `case` runs for each batch of the list."""

import pytest
from support.peers import CASES, Case


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param
