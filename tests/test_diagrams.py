"""The drawings of the method show the numbers of the losses, and nothing in them lies on top of something else."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.text import Annotation

from danet_core import diagrams, losses, slow
from danet_core.files import StudyError

# Identity 0 at the left, 1 at the right; visible below, infrared above. Centres: infrared of 0 (0, 1), of 1 (0.5, 1).
FEAT = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.5, 0.0], [0.5, 1.0]], dtype=torch.float64)
LABELS, MODALITIES = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])


def words(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.texts]


def markers(axis: Axes) -> list[tuple[float, float]]:
    """Where the features are drawn."""
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.get_lines() if line.get_markersize() == 8]


def test_the_diagram_of_the_network_has_every_part_and_no_box_on_another() -> None:
    figure = diagrams.framework()
    (axis,) = figure.axes
    shown = " ".join(words(axis))
    for part in ("backbone", "GAP", "BN neck", "$C$", "$C_v$", "$C_r$", "$L_{id}$", "$L_{cc}$", "$L_{sid}$", "$L_M$"):
        assert part in shown
    boxes = [patch.get_path().get_extents(patch.get_patch_transform()) for patch in boxes_of(axis)]
    assert len(boxes) == 14
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    figure.draw_without_rendering()
    texts = [text.get_window_extent() for text in axis.texts if not isinstance(text, Annotation)]
    frames = [patch.get_window_extent() for patch in boxes_of(axis)]
    for text in texts:
        assert any(frame.x0 < text.x0 and text.x1 < frame.x1 and frame.y0 < text.y0 for frame in frames)


def boxes_of(axis: Axes) -> list[FancyBboxPatch]:
    return [patch for patch in axis.patches if isinstance(patch, FancyBboxPatch)]


def test_the_geometry_shows_pull_and_push_of_both_readings() -> None:
    figure = diagrams.center_geometry(FEAT, LABELS, MODALITIES, 0.7, anchor=0)
    printed, prose = figure.axes
    assert markers(printed) == markers(prose) == [tuple(row) for row in FEAT.tolist()]
    # from (0, 1): the visible negative (0.5, 0) is farther than the margin, the infrared one (0.5, 1) is not
    assert re.search(r"= 1.00 .*0.7 - 1.12.* = 0.00", printed.get_xlabel())
    assert re.search(r"= 1.00 .*0.7 - 0.50.* = 0.20", prose.get_xlabel())
    assert "push" not in words(printed) and "push" in words(prose)
    assert "toy" in suptitle(figure)


def test_the_descent_ends_where_its_path_does_and_draws_the_terms_of_the_loss() -> None:
    path, _ = slow.descend(
        lambda feat: losses.cross_modality_center_loss(feat, LABELS, MODALITIES), [FEAT], rate=0.1, steps=4
    )
    states = [feat for (feat,) in path]
    figure = diagrams.center_descent(states, LABELS, MODALITIES, 0.7)
    before, after, curve = figure.axes
    assert markers(before) == [tuple(row) for row in FEAT.tolist()]
    assert markers(after) == [tuple(row) for row in states[-1].tolist()]
    expected = [losses.cross_modality_center_terms(feat, LABELS, MODALITIES) for feat in states]
    for line, name in zip(curve.get_lines(), ("pull", "push"), strict=True):
        assert line.get_label() == name
        assert list(line.get_ydata()) == pytest.approx([getattr(terms, name).item() for terms in expected])


def test_bars_are_the_two_classifiers_probabilities_and_mark_the_true_identity() -> None:
    visible, infrared = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    stages = {"first": (visible, infrared), "last": (infrared, infrared)}
    figure = diagrams.agreement(stages, torch.tensor([2]), torch.tensor([1]), {"L_M": [1.0, 0.5]})
    first, last, curve = figure.axes
    for axis, logits in ((first, (visible, infrared)), (last, (infrared, infrared))):
        heights = [bar.get_height() for bar in axis.patches if isinstance(bar, Rectangle) and bar.get_width() < 0.5]
        assert heights == pytest.approx(torch.cat(logits).softmax(1).flatten().tolist())
        (mark,) = axis.texts
        assert (mark.get_text(), mark.get_position()[0]) == ("true", 2)
    assert first.get_ylabel().startswith("infrared image")
    assert list(curve.get_lines()[0].get_ydata()) == [1.0, 0.5]
    assert "toy" in suptitle(figure)


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(StudyError, match="no stage to draw"):
        diagrams.agreement({}, LABELS, MODALITIES, {})
    with pytest.raises(StudyError, match="no step to draw"):
        diagrams.center_descent([], LABELS, MODALITIES, 0.7)


def suptitle(figure: Figure) -> str:
    assert figure._suptitle is not None  # type: ignore[attr-defined]
    return figure._suptitle.get_text()  # type: ignore[attr-defined]
