"""The schema of recordings is what ``record`` makes, and what is not a recording is refused."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import transformers as tf
import xarray as xr

import flocking
from flocking.recording import COORDINATES, SCHEMA_VERSION, VARIABLES, dataset, require


def kind_of(values: xr.DataArray) -> str:
    """The type as the schema names it; texts have no fixed width."""
    return "str" if values.dtype.kind == "U" else str(values.dtype)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("relative", [True, [1]])
def test_a_recording_has_the_schemas_variables(name: str, relative: object) -> None:
    model = helpers.build(name)
    recording = flocking.record(
        model, helpers.random_ids(20, 9), ranks=True, relative=relative, progress=False
    )
    mixture, some = name == "mixtral", relative is not True
    assert list(recording.data_vars) == [n for n in VARIABLES if mixture or n != "routed"]
    absent = set() if mixture else {"experts", "expert"}
    absent |= set() if some else {"relative_layer"}
    assert list(recording.coords) == [n for n in COORDINATES if n not in absent]
    assert tuple(recording.attrs) == dataset.ATTRIBUTES
    assert recording.attrs["schema_version"] == SCHEMA_VERSION
    for field_name, field in (VARIABLES | COORDINATES).items():
        if field_name not in recording:
            continue
        values = recording[field_name]
        dims = field.dims
        if field_name == "relative" and some:
            dims = ("sequence", "relative_layer", "token", "neuron")
        assert values.dims == dims, field_name
        assert kind_of(values) == field.dtype, field_name
        assert values.attrs == field.attributes, field_name


def test_the_estimate_of_memory_is_the_size_of_the_arrays() -> None:
    sizes = {"sequence": 2, "layer": 3, "window": 4, "neuron": 5, "token": 6, "routed_expert": 7}
    arrays = dataset.empty(VARIABLES, sizes)
    assert dataset.size_in_bytes(VARIABLES, sizes) == sum(a.nbytes for a in arrays.values())
    assert np.isnan(arrays["norm"]).all()
    assert not arrays["energy"].any()


def test_what_a_measure_needs_is_named_with_the_remedy(llama: tf.PreTrainedModel) -> None:
    recording = flocking.record(llama, [5, 6, 7], relative=[1], progress=False)
    assert require(recording, "energy", "tokens", phase="prompt") is recording
    for names, phase, message in (
        (["rank"], None, r"no variable 'rank': make it with record\(\.\.\., ranks=True\)"),
        (["relative"], None, r"'relative' of some layers only: .*relative=True"),
        ([], "generation", r"no phase 'generation': make it with record\(\.\.\., max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            require(recording, *names, phase=phase)
    for other in (recording.energy, recording.drop_vars("phase"), None):
        with pytest.raises(TypeError, match=r"expected a recording .*, got a"):
            require(other)
