"""What a warm start trains with."""

from cluster.config.files import validate
from cluster.demonstrations.warm_start import supervised_setup


def test_demonstrations_are_learnt_at_temperature_1_whatever_answers_are_sampled_at() -> None:
    """A model that learns at the sampling temperature has logits of another size, and another course of training."""
    config = validate({"rollout": {"temperature": 0.2}, "learner": {"lora": {}}})
    setup = supervised_setup(config, "models/start")
    assert setup.temperature == 1.0 and setup.model.path == "models/start" and setup.learner.lora is None
