"""The settings of an environment, and the base class of all settings.

A `Section` is a part of the run's config (`cluster.config.run_config.RunConfig`). Its fields' descriptions are their
documentation (`docs/config.md`). Settings modules import nothing heavier than pydantic, so that `coso --help` and
config errors are fast.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base class of config sections: immutable, rejects unknown keys, and takes no boolean for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads true as 1, and YAML reads yes and on as true.
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise PydanticCustomError("bool_instead", "Input should not be true or false (nor yes, no, on, off)")
        return value


class EnvironmentSettings(Section):
    """The environment, its deadlines and restarts."""

    id: str = Field("coso/NumberLine-v0", description="gymnasium id; `module:Name-v0` imports `module` first.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the environment.")
    deadline_s: PositiveFloat = Field(30.0, description="Deadline of each reset and step, seconds.")
    start_deadline_s: PositiveFloat = Field(60.0, description="Deadline for an environment to start, seconds.")
    restart_backoff_s: NonNegative = Field(
        0.5, description="Wait before the first restart, seconds; doubles with every failure in a row."
    )
    restart_backoff_max_s: NonNegative = Field(
        30.0, description="Longest wait before a restart, seconds, short of a quarantine."
    )
    quarantine_after: PositiveInt = Field(
        5, description="Failures in a row after which an environment is not restarted for `quarantine_s`."
    )
    quarantine_s: NonNegative = Field(60.0, description="Wait before a quarantined environment is restarted, seconds.")
