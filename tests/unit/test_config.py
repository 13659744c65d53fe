# SPDX-License-Identifier: Apache-2.0
"""Settings: every field documented, bad input refused in words, round trips."""

import ast
import dataclasses
import inspect
import itertools
from types import SimpleNamespace

import pytest

from knapspec_vllm import config
from knapspec_vllm.config import KnapSpecConfig


def test_every_field_has_a_default_and_a_docstring() -> None:
    tree = ast.parse(inspect.getsource(config))
    body = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "KnapSpecConfig"
    )
    documented = {
        node.target.id: (node.value, below)
        for node, below in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for field in dataclasses.fields(KnapSpecConfig):
        default, below = documented[field.name]
        assert default is not None, field.name
        assert isinstance(below, ast.Expr), f"{field.name} has no docstring"
        assert isinstance(below.value, ast.Constant), f"{field.name} has no docstring"


def test_every_range_belongs_to_a_field() -> None:
    assert set(config._RANGES) <= set(KnapSpecConfig.field_names())


def test_round_trip_keeps_only_what_differs() -> None:
    assert KnapSpecConfig().to_mapping() == {}
    settings = {"plan": "full", "draft_length": 3, "windows": False, "round_overhead_us": 5.0}
    parsed = KnapSpecConfig.from_mapping(settings)
    assert parsed.to_mapping() == settings
    assert KnapSpecConfig.from_mapping(parsed.to_mapping()) == parsed


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"window_token": 1}, "did you mean 'window_tokens'?"),
        ({"keep_first_layer": 1}, "did you mean 'keep_first_layers'?"),
        ({"qqqq": 1}, "known settings are: objective, strategy, plan"),
        ({"objective": "speed"}, "'objective' is 'speed'; write 'throughput' or 'paper'"),
        ({"bins": 1}, "'bins' is 1; write a number of 2 or more"),
        ({"bins": 2.5}, "'bins' is 2.5; write a whole number"),
        ({"bins": True}, "'bins' is True; write a whole number"),
        ({"windows": 1}, "'windows' is 1; write true or false"),
        ({"draft_length": "4"}, "'draft_length' is '4'; write a whole number or null"),
        ({"draft_length": 33}, "at most 32"),
        ({"min_speedup": 0.9}, "'min_speedup' is 0.9; write a number of 1 or more"),
        ({"max_saving": 0}, "'max_saving' is 0.0; write a number of more than 0, at most 1"),
        ({"hysteresis": float("nan")}, "'hysteresis' is nan; write a number"),
        ({"plan": " "}, "'plan' is empty"),
        ({"store_dir": 3}, "'store_dir' is 3; write text or null"),
    ],
)
def test_bad_settings_are_refused_in_words(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match="knapspec") as caught:
        KnapSpecConfig.from_mapping(settings)
    assert words in str(caught.value)


def test_not_a_mapping() -> None:
    with pytest.raises(ValueError, match="--additional-config"):
        KnapSpecConfig.from_mapping(["window_tokens"])  # type: ignore[arg-type]


def test_whole_numbers_stand_for_floats() -> None:
    value = KnapSpecConfig.from_mapping({"calibration_seconds": 5}).calibration_seconds
    assert value == 5.0
    assert isinstance(value, float)


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, {"knapspec": None}, object()])
def test_absent_settings_mean_defaults(additional: object) -> None:
    vllm_config = SimpleNamespace(additional_config=additional)
    assert KnapSpecConfig.from_vllm_config(vllm_config) == KnapSpecConfig()


def test_settings_come_from_additional_config() -> None:
    vllm_config = SimpleNamespace(additional_config={"knapspec": {"bins": 16}})
    assert KnapSpecConfig.from_vllm_config(vllm_config).bins == 16


def test_no_setting_shares_a_name_with_a_key_of_vllm() -> None:
    vllm_config = pytest.importorskip("vllm.config")
    theirs = {field.name for field in dataclasses.fields(vllm_config.SpeculativeConfig)}
    assert not theirs & set(KnapSpecConfig.field_names())
