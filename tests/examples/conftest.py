"""The `coso` command on a tiny model, as the whole runs of tests/cluster/ use it."""

from tests.cluster.conftest import coso, tiny_model

__all__ = ["coso", "tiny_model"]
