"""What a run left is read whole or refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import records

from danet_core.files import StudyError
from danet_core.runs import read_features, read_training_record


def test_a_training_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = records.training_record("synth_sysu", "b_cc")
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    assert read_training_record(path) == record


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        (lambda r: r.clear(), "it has no dataset"),
        (lambda r: r.pop("trial"), "it has no trial"),
        (lambda r: r.update(provenance=[]), "it has no provenance.data_sha256"),
        (lambda r: r["provenance"].pop("model_sha256"), "it has no provenance.model_sha256"),
        (lambda r: r.update(config=None), "it has no config.dataset"),
        (lambda r: r.update(history=[]), "a run without an epoch"),
    ],
)
def test_a_record_that_lacks_something_is_refused_by_file_and_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], lacks: str
) -> None:
    record = records.training_record("synth_sysu", "b_cc")
    change(record)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    with pytest.raises(StudyError, match=rf"record\.json is .*{lacks}.*train again"):
        read_training_record(path)


@pytest.mark.parametrize("text", ["[]", "3", '"record"', "null"])
def test_json_that_is_no_mapping_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(StudyError, match="is no record of a run"):
        read_training_record(tmp_path / "record.json")


def test_features_are_read_by_name_and_cut_or_torn_ones_are_refused_wherever_they_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "features.npz"
    with pytest.raises(StudyError, match=r"features\.npz is missing; .* run `dvc repro`"):
        read_features(path, ["feat"])
    np.savez(path, feat=np.arange(600.0), pids=np.arange(3))
    np.testing.assert_array_equal(read_features(path, ["pids"])["pids"], [0, 1, 2])
    with pytest.raises(StudyError, match=r"features\.npz is damaged \(.*camids"):
        read_features(path, ["feat", "camids"])
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StudyError, match=r"features\.npz is damaged .* run `dvc repro`"):
            read_features(path, ["feat"])
