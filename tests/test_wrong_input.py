"""Whatever is put in, what comes out is right, or one sentence: configuration, manifest, splits, distances, batch."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trees
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from danet_core import losses
from danet_core.config import Study, load_study
from danet_core.files import StudyError
from danet_core.metrics import retrieval_metrics
from danet_core.protocols import evaluate_regdb, evaluate_sysu, within_modality
from danet_core.sampler import IdentitySampler
from danet_core.store import PackedStore, StoreError, partial_path, read_galleries, read_manifest
from danet_core.strict import ConfigError, build
from data_prep.regdb import read_regdb
from data_prep.sysu_mm01 import read_sysu
from tests.stores import make_store

PARAMS = Path(__file__).parent.parent / "params.yaml"
few = settings(max_examples=40)


def in_a_sentence(error: Exception) -> None:
    """What every error is: one line that says more than a word."""
    text = str(error)
    assert "\n" not in text
    assert len(text.split()) >= 5, text


# ---------------------------------------------------------------- configuration

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-2, 2), max_size=3),
    st.dictionaries(st.one_of(st.text(max_size=3), st.integers(), st.booleans()), st.integers(), max_size=2),
)


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values in a tree of mappings and lists, but the root."""
    rows = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in rows:
        yield (*path, key)
        yield from places(value, (*path, key))


RAW = json.loads(json.dumps(yaml.safe_load(PARAMS.read_text(encoding="utf-8"))))  # without aliases
for _name, _row in RAW["datasets"].items():
    _row["name"] = _name  # as load_study does
PLACES = list(places(RAW))


@settings(max_examples=150)
@given(st.sampled_from(PLACES), st.one_of(junk, st.just("remove"), st.just("add")))
def test_any_value_of_the_configuration_is_taken_or_refused_in_a_sentence_that_names_its_place(
    place: tuple, value: Any
) -> None:
    tree = copy.deepcopy(RAW)
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    if value == "remove":
        del parent[place[-1]]
    elif value == "add" and isinstance(parent, dict):
        parent["nobody_knows_this"] = 1
    else:
        parent[place[-1]] = value
    try:
        study = build(Study, tree, "params.yaml")
    except ConfigError as error:
        in_a_sentence(error)
        # A list that lost an element, and a union that took another form, are named by what holds them.
        assert str(error).startswith("params.yaml") and str(place[0]) in str(error)
    else:
        assert (
            value != "remove" or isinstance(parent, list) or place[0] in ("variants", "recipes", "datasets", "readings")
        )
        assert isinstance(study, Study)


@few
@given(st.one_of(st.text(), st.binary(max_size=40).map(lambda raw: raw.decode("latin-1")), st.just("a: &x [*x]")))
def test_no_text_at_random_is_a_configuration_and_each_is_refused_in_a_sentence(store: Path, text: str) -> None:
    path = store.parent / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    in_a_sentence(caught.value)


# ---------------------------------------------------------------- stores


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("packed") / "synth_sysu", "sysu", identities=2, per_camera=1)


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Cut, changed, repeated or replaced bytes."""
    at = data.draw(st.integers(0, len(content)))
    to = data.draw(st.integers(at, min(len(content), at + 40)))
    put = data.draw(
        st.one_of(st.binary(max_size=20), st.sampled_from([b"", b"\n", b",", b'"', b"-1", b"1e9", b"\xff"]))
    )
    return content[:at] + put + content[to:]


@pytest.mark.parametrize("name", ["manifest.csv", "galleries.npz", "meta.json", "images.npy"])
@settings(max_examples=40)
@given(data=st.data())
def test_a_store_with_any_file_damaged_opens_as_it_was_or_is_refused_in_a_sentence(
    store: Path, name: str, data: st.DataObject
) -> None:
    path = store / name
    before = path.read_bytes()
    path.write_bytes(damaged(data, before))
    try:
        found = PackedStore.open(store)
    except StoreError as error:
        in_a_sentence(error)
        assert str(store) in str(error)
    else:
        assert path.read_bytes() == before or json.loads(path.read_bytes()) == found.meta
    finally:
        path.write_bytes(before)
    assert not partial_path(store).exists()


@few
@given(data=st.data())
def test_any_manifest_is_read_as_rows_of_a_known_kind_or_refused_in_a_sentence(
    store: Path, data: st.DataObject
) -> None:
    path = store.parent / "manifest.csv"
    path.write_bytes(damaged(data, (store / "manifest.csv").read_bytes()))
    try:
        table = read_manifest(path)
    except StoreError as error:
        in_a_sentence(error)
    else:
        assert set(table["modality"]) <= {"visible", "infrared"}
        assert table[["row", "pid", "camid"]].dtypes.eq(np.int64).all()
        assert table["row"].tolist() == list(range(len(table)))


@few
@given(st.binary(max_size=200))
def test_any_bytes_are_galleries_or_refused_in_a_sentence(store: Path, content: bytes) -> None:
    path = store.parent / "galleries.npz"
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        read_galleries(path)
    in_a_sentence(caught.value)


# ---------------------------------------------------------------- split files


@pytest.fixture(scope="module")
def regdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trees.write_regdb(tmp_path_factory.mktemp("raw") / "RegDB", trees.RegdbPlan(ids=4, images=2))


@pytest.fixture(scope="module")
def sysu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trees.write_sysu(tmp_path_factory.mktemp("raw") / "SYSU-MM01", trees.small_sysu_plan())


def settles(read: Callable[[], Any], allow_partial: bool) -> None:
    try:
        reading = read()
        reading.settle(allow_partial, "python -m data_prep verify")
    except StudyError as error:
        in_a_sentence(error)
        return
    splits = [name for name in reading.manifest if str(name).startswith("split_")]
    for name in splits:
        table = reading.manifest[reading.manifest[name] != ""]
        of_split = table.groupby("pid")[name].nunique()
        assert (of_split == 1).all(), "an identity is trained and tested on"


@few
@given(data=st.data(), allow_partial=st.booleans())
def test_any_split_file_of_regdb_gives_clean_splits_or_a_sentence(
    regdb: Path, data: st.DataObject, allow_partial: bool
) -> None:
    name = data.draw(st.sampled_from(["train_visible_1.txt", "test_visible_1.txt", "train_thermal_3.txt"]))
    path = regdb / "idx" / name
    before = path.read_bytes()
    path.write_bytes(damaged(data, before))
    try:
        settles(lambda: read_regdb(regdb, expected=None), allow_partial)
    finally:
        path.write_bytes(before)


@few
@given(data=st.data(), allow_partial=st.booleans())
def test_any_identity_list_of_sysu_mm01_gives_clean_splits_or_a_sentence(
    sysu: Path, data: st.DataObject, allow_partial: bool
) -> None:
    path = sysu / "exp" / data.draw(st.sampled_from(["train_id.txt", "val_id.txt", "test_id.txt"]))
    before = path.read_bytes()
    path.write_bytes(damaged(data, before))
    try:
        settles(
            lambda: read_sysu(sysu, expected=None, train_splits=("train", "val"), allow_partial=allow_partial),
            allow_partial,
        )
    finally:
        path.write_bytes(before)


@given(
    st.lists(st.tuples(st.sampled_from([-5, 0, 7, 2**40]), st.integers(0, 1)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_a_batch_has_the_asked_identities_in_both_modalities_or_the_sampler_refuses(
    images: list[tuple[int, int]], ids: int, each: int
) -> None:
    pids, modalities = (np.array(column) for column in zip(*images, strict=True))
    try:
        batches = IdentitySampler(pids, modalities, ids, each).epoch(3, np.random.default_rng(0))
    except StudyError as error:
        in_a_sentence(error)
        lacks_one = any(set(modalities[pids == pid]) != {0, 1} for pid in set(pids))
        assert lacks_one or len(set(pids)) < ids
        return
    assert batches.shape == (3, ids * 2 * each)
    for batch in batches:
        assert sorted(np.unique(pids[batch], return_counts=True)[1]) == [2 * each] * ids
        assert modalities[batch].sum() == ids * each


# ---------------------------------------------------------------- distance matrices and protocols

numbers = st.floats(width=32) | st.sampled_from([0.0, -0.0, np.inf, -np.inf, 1e-45, 3e38])
identities = st.sampled_from([-(2**63), -1, 0, 1, 2**31, 2**63 - 1])


@given(st.data(), st.sampled_from(["identity", "image"]), st.sampled_from([np.float32, np.float64]))
def test_any_distance_matrix_has_scores_between_0_and_1_or_is_refused_in_a_sentence(
    data: st.DataObject, level: Any, dtype: type
) -> None:
    n_query, n_gallery = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 6))
    dist = data.draw(arrays.arrays(dtype, (n_query, n_gallery), elements=numbers))
    q_pids = np.array(data.draw(st.lists(identities, min_size=n_query, max_size=n_query)), dtype=np.int64)
    g_pids = np.array(data.draw(st.lists(identities, min_size=n_gallery, max_size=n_gallery)), dtype=np.int64)
    ignore = data.draw(st.none() | arrays.arrays(bool, (n_query, n_gallery)))
    before = dist.copy()
    left = (q_pids[:, None] == g_pids) & (True if ignore is None else ~ignore)
    try:
        found = retrieval_metrics(dist, q_pids, g_pids, ignore=ignore, cmc=level)
    except StudyError as error:
        in_a_sentence(error)
        assert n_query == 0 or n_gallery == 0 or np.isnan(dist).any() or not left.any()
        return
    np.testing.assert_array_equal(dist, before)
    assert found.n_valid == left.any(axis=1).sum() > 0
    assert 0 < found.mINP <= 1 and 0 < found.mAP <= 1
    assert (np.diff(found.cmc) >= 0).all() and found.cmc[0] >= 0 and found.cmc[-1] == 1


def features(seed: int, kind: str, n: int) -> np.ndarray:
    feat = np.random.default_rng(seed).standard_normal((n, 3)).astype(np.float32)
    return {"random": feat, "equal": feat[:1].repeat(n, 0), "twice": feat[np.arange(n) // 2], "zero": 0 * feat}[kind]


@given(
    st.integers(0, 2**31),
    st.sampled_from(["random", "equal", "twice", "zero"]),
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([3, 6])), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4, 5])), min_size=1, max_size=6),
)
def test_any_features_have_scores_in_every_protocol_or_no_query_has_a_match(
    seed: int, kind: str, query: list[tuple[int, int]], gallery: list[tuple[int, int]]
) -> None:
    (q_pids, q_camids), (g_pids, g_camids) = (np.array(side).T for side in (query, gallery))
    feat = features(seed, kind, len(query) + len(gallery))
    q_feat, g_feat = feat[: len(query)], feat[len(query) :]
    same = q_pids[:, None] == g_pids
    everyone = np.arange(len(gallery))[None]
    calls = [
        (lambda: evaluate_regdb(q_feat, q_pids, g_feat, g_pids), same.any()),
        (
            lambda: evaluate_sysu(q_feat, q_pids, q_camids, g_feat, g_pids, g_camids, everyone),
            (same & ~((q_camids[:, None] == 3) & (g_camids == 2))).any(),
        ),
    ]
    for call, matches in calls:
        if matches:
            assert all(0 <= value <= 1 for value in call().mean.values())
        else:
            with pytest.raises(StudyError, match=r"none of the \d+ queries has a match") as caught:
                call()
            in_a_sentence(caught.value)


def test_a_gallery_whose_camera_is_ignored_entirely_leaves_no_score() -> None:
    feat = features(0, "random", 4)
    pids = np.array([1, 2])
    with pytest.raises(StudyError, match="none of the 2 queries has a match"):
        evaluate_sysu(feat[:2], pids, np.array([3, 3]), feat[2:], pids, np.array([2, 2]), np.array([[0, 1]]))
    seen = evaluate_sysu(feat[:2], pids, np.array([3, 6]), feat[2:], pids, np.array([2, 2]), np.array([[0, 1]]))
    assert (seen.n_query, seen.n_valid) == (2, 1)  # the query of camera 6 may look at camera 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_feature_that_is_not_finite_is_refused_by_every_protocol(value: float, side: int) -> None:
    sides = [features(0, "random", 2), features(1, "random", 2)]
    sides[side][1, 2] = value
    pids = np.array([1, 2])
    for call in (
        lambda: evaluate_regdb(sides[0], pids, sides[1], pids),
        lambda: evaluate_sysu(sides[0], pids, pids * 0 + 3, sides[1], pids, pids * 0 + 1, np.array([[0, 1]])),
        lambda: within_modality(sides[side], pids * 0, pids),
    ):
        with pytest.raises(StudyError, match="finite") as caught:
            call()
        in_a_sentence(caught.value)


@pytest.mark.parametrize("empty", ["query", "gallery"])
def test_an_empty_side_is_refused_by_every_protocol(empty: str) -> None:
    n = {"query": 2, "gallery": 2} | {empty: 0}
    q_feat, g_feat = features(0, "random", n["query"]), features(1, "random", n["gallery"])
    q_pids, g_pids = np.arange(n["query"]), np.arange(n["gallery"])
    galleries = np.arange(n["gallery"])[None]
    for call in (
        lambda: evaluate_regdb(q_feat, q_pids, g_feat, g_pids),
        lambda: evaluate_sysu(q_feat, q_pids, q_pids * 0 + 3, g_feat, g_pids, g_pids * 0 + 1, galleries),
    ):
        with pytest.raises(StudyError) as caught:
            call()
        in_a_sentence(caught.value)


# ---------------------------------------------------------------- loss batches

KINDS = ("normal", "equal", "duplicates", "zero", "huge", "tiny", "far from the origin")


def batch_of(data: st.DataObject, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features (B, 4), labels with gaps, modalities; B from 0."""
    rows = data.draw(st.lists(st.tuples(st.sampled_from([-7, 0, 3, 1000]), st.integers(0, 1)), max_size=8))
    labels, modalities = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in (0, 1))
    feat = torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**31))))
    if kind == "equal" and len(rows):
        feat = feat[:1].repeat(len(rows), 1)
    elif kind == "duplicates":
        feat = feat[torch.arange(len(rows)) // 2]
    scale = {"zero": 0.0, "huge": 1e15, "tiny": 1e-25}.get(kind, 1.0)
    return feat * scale + (1e6 if kind == "far from the origin" else 0), labels, modalities


def complete(labels: Tensor, modalities: Tensor) -> bool:
    """Whether the batch has at least two identities, each in both modalities."""
    pairs = set(zip(labels.tolist(), modalities.tolist(), strict=True))
    return len(set(labels.tolist())) >= 2 and len(pairs) == 2 * len(set(labels.tolist()))


def assert_finite(loss: Tensor, *inputs: Tensor) -> None:
    assert loss.isfinite() and loss >= 0
    for gradient in torch.autograd.grad(loss, inputs):
        assert gradient.isfinite().all()


METRIC: list[tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], bool]]] = [
    (lambda f, y, s: losses.triplet_loss(f, y, 0.7), lambda y, s: len(set(y.tolist())) >= 2),
    (lambda f, y, s: losses.cross_modality_triplet_loss(f, y, s, 0.7), complete),
    (lambda f, y, s: losses.cross_modality_center_loss(f, y, s, 0.7, "anchor"), complete),
    (lambda f, y, s: losses.cross_modality_center_loss(f, y, s, 0.7, "center"), complete),
]


@settings(max_examples=250)
@given(st.data(), st.sampled_from(KINDS), st.sampled_from(METRIC))
def test_a_metric_loss_and_its_gradient_are_finite_wherever_it_is_defined_and_a_sentence_elsewhere(
    data: st.DataObject, kind: str, loss: tuple
) -> None:
    feat, labels, modalities = batch_of(data, kind)
    function, defined = loss
    if defined(labels, modalities):
        feat.requires_grad_()
        assert_finite(function(feat, labels, modalities), feat)
        return
    with pytest.raises(StudyError) as caught:
        function(feat, labels, modalities)
    in_a_sentence(caught.value)


@settings(max_examples=60)
@given(st.data(), st.sampled_from(METRIC), st.sampled_from([np.inf, -np.inf, np.nan]))
def test_one_infinity_in_a_batch_never_passes_for_a_finite_loss(data: st.DataObject, loss: tuple, value: float) -> None:
    labels, modalities = torch.tensor([3, 3, 3, 9, 9, 9]), torch.tensor([0, 1, 1, 0, 0, 1])
    feat = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    feat[data.draw(st.integers(0, 5)), data.draw(st.integers(0, 3))] = value
    assert not loss[0](feat, labels, modalities).isfinite()


@settings(max_examples=150)
@given(st.data(), st.sampled_from([0.0, 1.0, 1e4, 1e30]))
def test_classifier_losses_and_their_gradients_are_finite_with_both_modalities_and_a_sentence_without(
    data: st.DataObject, scale: float
) -> None:
    rows = data.draw(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 2)), max_size=6))
    labels, modalities = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in (0, 1))
    draws = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    visible, infrared = (
        (scale * torch.randn(len(rows), 3, generator=draws)).requires_grad_() for _ in ("visible", "infrared")
    )
    both = set(modalities.tolist()) == {0, 1}
    classes = set(labels.tolist()) <= {0, 1, 2}
    for call, defined in (
        (lambda: losses.modality_identity_loss(visible, infrared, labels, modalities), both and classes),
        (lambda: losses.mutual_learning_loss(visible, infrared, modalities), both),
    ):
        if defined:
            loss = call()
            assert loss >= -1e-6  # a divergence of zero, rounded
            assert_finite(loss.clamp(min=0), visible, infrared)
        else:
            with pytest.raises(StudyError) as caught:
                call()
            in_a_sentence(caught.value)
