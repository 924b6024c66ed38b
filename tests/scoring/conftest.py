"""What all tests of scoring share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """As scorers and trainer have, so that sums are taken in the same order; and two busy cores get no slower by it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
