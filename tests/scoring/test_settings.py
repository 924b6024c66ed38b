"""Settings that cannot work are refused."""

import pytest

from cluster.config.files import load_config
from cluster.errors import CosoError
from scoring.scm.shape import ScmSizes
from scoring.settings import ScmSettings, ScoringSettings


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (ScmSettings, {"layers": 0}, "layers\n.*greater than 0"),
        (ScmSettings, {"heads": 5}, r"hidden \(128\) must be a multiple of scoring.scm.heads \(5\)"),
        (ScoringSettings, {"workers": 0}, "workers\n.*greater than 0"),
        (ScoringSettings, {"precision": "int8"}, "float64"),
        (ScoringSettings, {"estimator": "oracle"}, "scm.parser"),
        (ScmSizes, {"vocab_size": 10, "head_sizes": ()}, "head_sizes is empty"),
        (ScmSizes, {"vocab_size": 10, "head_sizes": (2, 0)}, r"head_sizes\[1\] is 0"),
    ],
)
def test_impossible_settings_are_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        section(**change)


def test_a_width_that_the_heads_do_not_divide_is_reported_with_its_source():
    with pytest.raises(CosoError) as error:
        load_config([], ["scoring.scm.heads=3"])
    assert str(error.value) == (
        "config (in override 'scoring.scm.heads=3'): scoring.scm.hidden (128) must be a multiple of "
        "scoring.scm.heads (3)"
    )


def test_a_pass_is_as_large_as_the_device_wants_unless_the_settings_say() -> None:
    assert ScoringSettings().pass_tokens == 1536
    assert ScoringSettings(device="cuda").pass_tokens == 100_000
    assert ScoringSettings(device="cuda", batch_tokens=300).pass_tokens == 300
