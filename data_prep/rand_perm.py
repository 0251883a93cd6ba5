"""rand_perm_cam.mat: which images of SYSU-MM01 form the random gallery of each of ten trials.

A MATLAB v5 file with one cell array per camera. An HDF5 (v7.3) copy is not the original, but is read, with a warning.
Source: the authors' evaluation code, repository wuancong/SYSU-MM01, evaluation/data_split/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from danet_core.files import StudyError
from data_prep.reading import Reading, find_file, find_folder

CAMERAS = (1, 2, 3, 4, 5, 6)
TRIALS = 10
MAT_SOURCE = (
    "it is not in the images' archive: copy it from evaluation/data_split/ of the authors' evaluation code "
    "(repository wuancong/SYSU-MM01) to exp/"
)
MAT_FOLDERS = ("exp", "", "data_split", "evaluation/data_split")


def read_rand_perm(reading: Reading) -> dict[int, list[np.ndarray]]:
    """Read and check rand_perm_cam.mat: {camid: [cell of identity 1, cell of identity 2, ...]}.

    A cell is (10, m): a row per trial, each a permutation of 1..m; (10, 0) for an identity the camera has not seen. The
    cells are uint8 in the original: cast before arithmetic.

    Raises StudyError when the file is missing (it is not in the images' archive), cannot be read, or has other content.
    """
    path = _find_rand_perm(reading)
    try:
        head = path.read_bytes()[:520]
    except OSError as error:
        raise StudyError(
            f"{path} cannot be read ({error.strerror}); give yourself read access or copy it again"
        ) from None
    if not head:
        raise StudyError(f"{path} has 0 bytes; {MAT_SOURCE}")
    if head.startswith(b"MATLAB 7.3") or b"\x89HDF\r\n\x1a\n" in head:
        reading.warn("rand_perm_cam.mat is an HDF5 (v7.3) copy, not the original; its content was checked")
        cells = _load_hdf5(path)
    else:
        cells = _load_mat5(path)
    for cam, cam_cells in cells.items():
        for i, rows in enumerate(cam_cells):
            cam_cells[i] = _checked_cell(path, cam, i + 1, rows)
    return cells


def _find_rand_perm(reading: Reading) -> Path:
    for relative in MAT_FOLDERS:
        folder: Path | None = reading.root
        for part in Path(relative).parts:
            folder = find_folder(reading, folder, part) if folder is not None else None
        path = find_file(reading, folder, "rand_perm_cam.mat") if folder is not None else None
        if path is not None:
            return path
    raise StudyError(
        f"{reading.root / 'exp' / 'rand_perm_cam.mat'} is missing, which the ten galleries are drawn from; {MAT_SOURCE}"
    )


def _load_mat5(path: Path) -> dict[int, list[np.ndarray]]:
    import scipy.io

    try:
        content = scipy.io.loadmat(path, variable_names=["rand_perm_cam"])
    except Exception as error:  # scipy raises whatever a damaged file leads it to
        raise StudyError(f"{path} is not a readable MATLAB file ({type(error).__name__}); {MAT_SOURCE}") from None
    outer = content.get("rand_perm_cam")
    if not isinstance(outer, np.ndarray) or outer.dtype != object or outer.size != len(CAMERAS):
        found = (
            "no such variable"
            if outer is None
            else f"{type(outer).__name__} {getattr(outer, 'shape', '')} {outer.dtype}"
        )
        raise StudyError(f"{path}: expected the cell array rand_perm_cam (6, 1), found {found}; {MAT_SOURCE}")
    return {cam: [np.asarray(cell) for cell in np.ravel(outer)[cam - 1].ravel()] for cam in CAMERAS}


def _load_hdf5(path: Path) -> dict[int, list[np.ndarray]]:
    """A v7.3 copy: cell arrays are arrays of references, and every axis is reversed."""
    fix = "save it again in MATLAB with `save(..., '-v7')`, or take the original: " + MAT_SOURCE
    try:
        import h5py

        with h5py.File(path, "r") as file:
            outer = file["rand_perm_cam"][()].ravel()
            cells = {
                cam: [_hdf5_matrix(file[reference]) for reference in file[outer[cam - 1]][()].ravel()]
                for cam in CAMERAS
            }
    except Exception as error:  # h5py raises whatever a damaged file leads it to
        raise StudyError(
            f"{path} is an HDF5 (MATLAB v7.3) copy that cannot be read ({type(error).__name__}); {fix}"
        ) from None
    return cells


def _hdf5_matrix(dataset: Any) -> np.ndarray:
    if dataset.attrs.get("MATLAB_empty", 0):  # an empty matrix stores its size, not its values
        return np.zeros((TRIALS, 0), dtype=np.uint8)
    return dataset[()].T


def _checked_cell(path: Path, cam: int, pid: int, rows: np.ndarray) -> np.ndarray:
    if rows.dtype != object and rows.shape in ((TRIALS, 0), (0, 0)):
        return np.zeros((TRIALS, 0), dtype=np.uint8)
    valid = rows.ndim == 2 and rows.shape[0] == TRIALS and rows.dtype.kind in "uif"
    if not valid or not (np.sort(rows, axis=1) == np.arange(1, rows.shape[1] + 1)).all():
        raise StudyError(
            f"{path}: cell of camera {cam}, identity {pid}: expected 10 rows, each a permutation of 1..m, "
            f"found {rows.dtype} {rows.shape} of other content; {MAT_SOURCE}"
        )
    return rows
