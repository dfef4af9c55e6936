from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from phikit.base.config import ABSENT, Config, Difference, differences, fingerprint
from phikit.base.errors import ConfigError


class Optim(Config):
    lr: float = 1e-3
    weight_decay: float = Field(default=0.1, ge=0)


class Job(Config):
    name: str
    steps: int = 10
    optim: Optim = Optim(lr=3e-4, weight_decay=0.0)
    stages: tuple[Optim, ...] = ()
    top_k: int | None = 5


class Adam(Config):
    kind: Literal["adam"] = "adam"
    name: str = "first"
    lr: float = 1.0


class Muon(Config):
    kind: Literal["muon"] = "muon"
    name: str = "second"
    momentum: float = 0.9
    inner: Optim = Optim()
    muon: Optim = Optim()  # a setting may bear the name of its own kind


class Plan(Config):
    parts: tuple[Annotated[Adam | Muon, Field(discriminator="kind")], ...] = (Adam(), Muon())
    weights: dict[str, float] = Field(default_factory=lambda: {"a": 1.0})
    least: int = 0
    most: int = 9

    @model_validator(mode="after")
    def _ordered(self) -> "Plan":
        if self.least > self.most:
            raise ValueError(f"least {self.least} is above most {self.most}")
        return self


def test_items_of_a_list_go_by_number_or_name():
    plan = Plan().override(["parts.0.lr=2", "parts.second.inner.lr=3", "weights.b=4"])
    assert plan.parts[0] == Adam(lr=2.0)
    assert plan.parts[1] == Muon(inner=Optim(lr=3.0))
    assert plan.weights == {"a": 1.0, "b": 4.0}
    assert Plan.resolve({}, ["parts.1.momentum=0.5"]).parts == (Adam(), Muon(momentum=0.5))
    with pytest.raises(ConfigError) as caught:
        Plan().override(["parts.2.lr=1", "parts.secnd.lr=1"])
    assert "parts.2.lr: parts has no item '2'" in str(caught.value)
    assert "parts.secnd.lr: parts has no item 'secnd'; did you mean second?" in str(caught.value)


def test_paths_are_those_a_user_writes_and_unions_leave_no_tag():
    with pytest.raises(ConfigError) as caught:
        Plan().override(
            ["parts.0.momentu=1", "parts.1.momentu=1", "parts.1.inner.lr=x", "parts.1.muon.lrr=1"]
        )
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "parts.first.momentu: unknown setting; did you mean name?" in lines
    assert "parts.second.momentu: unknown setting; did you mean momentum?" in lines
    assert "parts.second.muon.lrr: unknown setting; did you mean lr?" in lines
    assert any(line.startswith("parts.second.inner.lr: ") for line in lines)


def test_rules_about_several_settings_are_reported_without_the_whole_input():
    with pytest.raises(ConfigError, match=r"\(whole config\): least 5 is above most 1\n"):
        Plan().override(["least=5", "most=1"])


def test_assignments_are_json_and_fall_back_to_text():
    job = Job.resolve({"name": "a"}, ["name=base", "steps=20", "top_k=null", "optim.lr=2e-5"])
    assert (job.name, job.steps, job.top_k, job.optim.lr) == ("base", 20, None, 2e-5)


def test_partial_assignment_refines_the_default_of_its_parent():
    job = Job.resolve({"name": "a"}, ["optim.lr=1"])
    assert job.optim.weight_decay == 0.0


def test_all_faults_are_reported_together_with_paths():
    with pytest.raises(ConfigError) as caught:
        Job.resolve(
            {"optim": {"weight_decay": -1, "learning_rate": 1}, "stages": [{"lrr": 1}]},
            ["steps=many", "nonsense", "steps.deep=1"],
        )
    message = str(caught.value)
    assert "name: required and not given" in message
    assert "optim.weight_decay: " in message and "got -1" in message
    assert "optim.learning_rate: unknown setting" in message
    assert "stages.0.lrr: unknown setting; did you mean lr?" in message
    assert "steps: " in message and "'many'" in message
    assert "'nonsense': not of the form" in message
    assert "steps is a single value" in message
    assert "7 faults" in message


def test_unknown_key_names_the_nearest_match():
    with pytest.raises(ConfigError, match=r"stepz: unknown setting; did you mean steps\?"):
        Job.resolve({"name": "a"}, ["stepz=3"])


def test_resolve_leaves_its_input_alone():
    data = {"name": "a", "optim": {"lr": 1.0}}
    Job.resolve(data, ["optim.lr=2"])
    assert data == {"name": "a", "optim": {"lr": 1.0}}


def test_configs_are_frozen_and_refuse_nan():
    job = Job(name="a")
    with pytest.raises(ValidationError):
        job.steps = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="finite"):
        Job.resolve({"name": "a"}, ["optim.lr=NaN"])


def test_override_returns_a_validated_copy():
    job = Job(name="a")
    assert job.override(["optim.lr=1", "steps=3"]).optim == Optim(lr=1, weight_decay=0.0)
    assert job.steps == 10


def test_fingerprint_ignores_key_order_and_sees_values():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(Job(name="a")) == fingerprint(Job(name="a").model_dump(mode="json"))
    assert fingerprint(Job(name="a")) != fingerprint(Job(name="b"))
    assert len(fingerprint(1)) == 32


def test_differences_descend_into_dicts_and_lists():
    a = {"x": {"y": 1, "z": 2}, "l": [1, {"k": 2}], "only_a": 0}
    b = {"x": {"y": 1, "z": 3}, "l": [1, {"k": 4}, 5]}
    assert differences(a, b) == [
        Difference("x.z", 2, 3),
        Difference("l.1.k", 2, 4),
        Difference("l.2", ABSENT, 5),
        Difference("only_a", 0, ABSENT),
    ]
    assert differences(a, a) == []
