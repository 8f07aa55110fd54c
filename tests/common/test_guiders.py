"""What every guider of the catalogue keeps: diffusers' BaseGuidance contract, config round trip, clear refusals."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.modular_pipelines.modular_pipeline import BlockState

from diffusers_ext.registry import list_methods


GUIDERS = list_methods(kind="guider")
pytestmark = pytest.mark.parametrize("record", GUIDERS, ids=lambda r: r.slug)


def fields(guider) -> dict[str, tuple[torch.Tensor, ...]]:
    """One field with a different value for every prediction."""
    return {"x": tuple(torch.full((2, 3), float(i)) for i in range(len(guider._input_predictions)))}


def test_is_a_diffusers_guider(record):
    guider = record.public()
    assert isinstance(guider, BaseGuidance)
    assert list(inspect.signature(guider.forward).parameters) == guider._input_predictions


def test_batches_match_the_conditions(record):
    guider = record.public()
    guider.set_state(step=0, num_inference_steps=4, timestep=torch.tensor(999.0))
    batches = guider.prepare_inputs(fields(guider))
    assert len(batches) == guider.num_conditions
    assert [getattr(b, guider._identifier_key) for b in batches] == guider._input_predictions[: len(batches)]
    assert [b.x[0, 0].item() for b in batches] == [float(i) for i in range(len(batches))]


def test_block_state_and_values_agree(record):
    guider = record.public()
    values = fields(guider)["x"]
    names = tuple(f"x{i}" for i in range(len(values)))
    batches = guider.prepare_inputs_from_block_state(BlockState(**dict(zip(names, values))), {"x": names})
    assert [b.x[0, 0].item() for b in batches] == [b.x[0, 0].item() for b in guider.prepare_inputs({"x": values})]


def test_wrong_number_of_predictions_is_refused(record):
    guider = record.public()
    batches = guider.prepare_inputs(fields(guider))[:-1]
    for batch in batches:
        batch.noise_pred = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="Expected"):
        guider(batches)


def test_disabled_is_the_first_prediction(record):
    guider = record.public(enabled=False)
    (batch,) = guider.prepare_inputs(fields(guider))
    batch.noise_pred = torch.randn(2, 3)
    assert guider.num_conditions == 1
    assert torch.equal(guider([batch]).pred, batch.noise_pred)


def test_config_survives_saving(record, tmp_path):
    guider = record.public()
    numbers = [k for k, v in guider.config.items() if type(v) is float and k not in ("start", "stop")]
    changed = guider.new(**{k: guider.config[k] + 0.25 for k in numbers}, stop=0.75)
    changed.save_pretrained(tmp_path)
    again = record.public.from_pretrained(tmp_path)
    assert numbers
    settings = [k for k in guider.config if not k.startswith("_")]
    assert [again.config[k] for k in settings] == [changed.config[k] for k in settings]
    assert all(again.config[k] != guider.config[k] for k in numbers)
    assert json.loads((tmp_path / "guider_config.json").read_text())["_class_name"] == record.public.__name__


def test_bad_windows_are_refused(record):
    for window in ({"start": -0.1}, {"start": 0.5, "stop": 0.2}, {"stop": 1.5}):
        with pytest.raises(ValueError):
            record.public(**window)


def test_is_documented(record):
    doc = inspect.getdoc(record.public)
    assert "Args:" in doc and "Example:" in doc
    assert all(f"{p}" in doc for p in inspect.signature(record.public.__init__).parameters if p != "self")
