"""The modality gap as one number: how well a linear classifier tells the modality from the feature. NumPy only."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from danet_core import INFRARED, MODALITIES, VISIBLE
from danet_core.distances import normalise
from danet_core.files import StudyError

FOLDS = 5
RIDGE = 1e-3  # penalty as a share of the feature's mean variance per dimension
_ROUNDING = 1e-20  # variance of unit vectors below which they are equal, and what is left is rounding
_TIE = 1e-9  # of the targets' distance from 0: nearer to the threshold is not above it


def modality_probe(
    feat: Float[np.ndarray, "N D"],
    pids: Int[np.ndarray, " N"],
    modalities: Int[np.ndarray, " N"],
    *,
    folds: int = FOLDS,
) -> float:
    """Balanced accuracy of a linear probe for the modality, on identities it was not fitted to.

    Features are L2-normalised, as retrieval compares them. The probe is ridge regression on the targets -1 (visible)
    and +1 (infrared), both modalities weighted alike, with an intercept and the fixed penalty RIDGE times the mean
    variance of a dimension: nothing is tuned. Identities, in ascending order, are dealt to min(`folds`, identities)
    folds in turn; each fold is predicted by a probe fitted to the others, so that no identity is on both sides.

    Returns the mean of the two modalities' recalls over all N images, a fraction: 0.5 where no linear direction that
    carries over to other people tells the modality, 1 where one always does. It can fall a little below 0.5 by chance.

    modalities: 0 visible, 1 infrared. Raises StudyError for fewer than two identities, a feature
    that is not finite, and when a probe would see only one modality.
    Choice: the paper has no such number. The direction is the one of Fisher's linear discriminant, regularised.
    """
    ids, label = np.unique(pids, return_inverse=True)
    if len(ids) < 2:
        raise StudyError(
            f"the modality probe is tested on other identities than it is fitted to, and the features hold {len(ids)}; "
            "expected at least 2"
        )
    unit = normalise(feat)
    fold = label % min(folds, len(ids))
    said = np.zeros(len(unit), dtype=bool)
    for held_out in np.unique(fold):
        fitted = fold != held_out
        direction, offset = _fit(unit[fitted], modalities[fitted])
        said[~fitted] = unit[~fitted] @ direction > offset
    recalls = [float((said[modalities == one] == (one == INFRARED)).mean()) for one in (VISIBLE, INFRARED)]
    return float(np.mean(recalls))


def _fit(unit: np.ndarray, modalities: np.ndarray) -> tuple[np.ndarray, float]:
    """Direction (D,) and threshold; a projection above the threshold says infrared."""
    weight = np.zeros(len(unit))
    for one in (VISIBLE, INFRARED):
        chosen = modalities == one
        if not chosen.any():
            raise StudyError(
                f"the modality probe has no {MODALITIES[one]} image to be fitted to; expected both modalities in every "
                "fold: give it the test features of both"
            )
        weight[chosen] = 0.5 / chosen.sum()
    centre = weight @ unit
    centred = unit - centre
    gram = (centred * weight[:, None]).T @ centred  # (D, D) covariance, modalities weighted alike
    variance = np.trace(gram)
    if variance < _ROUNDING:
        return np.zeros(len(gram)), 0.0
    penalty = RIDGE * variance / len(gram)
    towards = (weight * np.where(modalities == INFRARED, 1.0, -1.0)) @ centred
    direction = np.linalg.solve(gram + penalty * np.eye(len(gram)), towards)
    return direction, float(centre @ direction) + _TIE
