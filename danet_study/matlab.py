"""Variables of MATLAB files, version 5 and version 7.3 (HDF5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io

from danet_study.files import StudyError


def read_mat(path: Path, name: str, kind: type = object) -> Any:
    """A variable, or "struct/field": an array with MATLAB's axes, or for a cell array the list of its cells.

    Raises StudyError for a file that is missing, damaged, or without the variable, and for one that is not of `kind`.
    """
    value = _read(path, name)
    if not isinstance(value, kind):
        expected = "a cell array" if kind is list else "an array"
        raise StudyError(f"{path}: {name} is not {expected}; copy the file again")
    return value


def _read(path: Path, name: str) -> Any:
    variable, *field = name.split("/")
    try:
        if h5py.is_hdf5(path):
            with h5py.File(path) as file:
                return _hdf5_value(file, file[name])
        value = scipy.io.loadmat(path, variable_names=[variable])[variable]
        return _value(value[field[0]][0, 0] if field else value)
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; copy it there or correct the path") from None
    except Exception as error:  # scipy and h5py raise anything on damaged files
        raise StudyError(f"{path}: {name} cannot be read ({type(error).__name__}); copy the file again") from None


def _value(value: np.ndarray) -> Any:
    return [_value(cell) for cell in value.ravel()] if value.dtype == object else value


def _hdf5_value(file: h5py.File, data: Any) -> Any:
    """Cells are references, axes are reversed, and an empty matrix stores its size."""
    if data.attrs.get("MATLAB_empty", 0):
        return np.zeros(data[()].astype(int))
    if data.attrs.get("MATLAB_class") == b"char":  # stored as integers
        return np.array([chr(code) for code in data[()].ravel()])
    return [_hdf5_value(file, file[cell]) for cell in data[()].ravel()] if data.dtype == object else data[()].T
