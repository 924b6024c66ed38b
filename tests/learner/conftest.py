"""The Ray session of the tests that start learner ranks."""

import pytest
import ray


@pytest.fixture(scope="module")
def ray_session():
    if ray.is_initialized():
        yield
        return
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()
