"""Agreement of C_v and C_r, and gradient norms, against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from stores import ROOT, make_project, small_run

from danet_core.model import DANet, Output
from danet_study.checkpoint import build_model
from danet_study.classifiers import classifier_agreement
from danet_study.config import load_study
from danet_study.data import Batch, TrainingImages
from danet_study.store import PackedStore


class Seen(TrainingImages):
    """Training images of two identities, two visible and two infrared each, whose pixels name the identity."""

    def __init__(self):
        self.pids, self.modalities = np.repeat([7, 9], 4), np.tile([0, 0, 1, 1], 2)

    def batches(self, positions):
        for row in positions:
            labels, modalities = torch.from_numpy(self.pids[row] // 9), torch.from_numpy(self.modalities[row])
            yield Batch((100 * labels).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).byte(), labels, modalities)


class Two(DANet):
    """Feature (1, 0) or (0, 1) by identity, a learned scale, and heads with the given weights; no neck."""

    def __init__(self, c, c_v, c_r):
        torch.nn.Module.__init__(self)
        self.scale = torch.nn.Parameter(torch.ones(1))
        names = ("classifier", "classifier_visible", "classifier_infrared")
        for name, weight in zip(names, (c, c_v, c_r), strict=True):
            head = torch.nn.Linear(2, 2, bias=False)
            head.weight.data = torch.tensor(weight, dtype=torch.float32)
            setattr(self, name, head)

    def embed(self, images, modalities=None):
        second = (images[:, 0, 0, 0] > images.min() + 0.1).float()
        feat = self.scale * torch.stack([1 - second, second], 1)
        return feat, feat

    def forward(self, images, modalities=None):
        feat, feat_bn = self.embed(images)
        heads = self.classifier_visible.weight, self.classifier_infrared.weight
        return Output(feat, feat_bn, self.classifier(feat_bn), heads)


def two_config(**losses):
    config = load_study(ROOT / "params.yaml").run("synth_sysu-1", "baseline", 0)
    augment = config.recipe.augment.model_copy(update={"flip": 0.0, "erase": 0.0})
    recipe = config.recipe.model_copy(update={"augment": augment, "ids_per_batch": 2, "imgs_per_modality": 2})
    return config.model_copy(update={"recipe": recipe, "losses": {k: {"weight": v} for k, v in losses.items()}})


def test_equal_classifiers_have_cosine_1_and_nothing_to_learn_from_each_other():
    one = [[2.0, 0.0], [0.0, 2.0]]
    found = classifier_agreement(Two(one, one, one), Seen(), two_config(L_id=1.0, L_sid=1.0, L_M=2.5))
    assert found["cosine"] == {"mean": 1.0, "std": 0.0}
    assert found["accuracy"] == {head: {"visible": 1.0, "infrared": 1.0} for head in ("C", "C_v", "C_r")}
    # L_id is a mean over all images, L_sid the sum of the means over visible and over infrared ones: twice as much.
    assert found["gradient"]["L_sid"]["mean"] == pytest.approx(2) and found["gradient"]["L_M"]["mean"] == 0


def test_classifiers_of_a_hand_made_case():
    # C_v is right, C_r has its rows exchanged: cosine 0. On f = (1, 0) C and C_v say (1, 0), C_r says (0, 1).
    # With p = e / (1 + e), d L_id / d f = (softmax - target) / B = (1 - p) (-1, 1) / B: norm (1 - p) sqrt(2) / B.
    # L_M: with z = f_1 - f_2 the first class has probability s(z) in C_v and s(-z) in C_r, so for either modality
    # |KL(cross || same)| = z (2 s(z) - 1). Its slope at z = 1 is (2 p - 1) + 2 p (1 - p), and d z / d f = (1, -1):
    # norm sqrt(2) slope / n, with n = B / 2 images of a modality.
    eye, swapped = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
    model, p = Two(eye, eye, swapped), math.e / (1 + math.e)
    found = classifier_agreement(model, Seen(), two_config(L_id=3.0, L_M=2.5))
    assert found["cosine"] == {"mean": 0.0, "std": 0.0}
    assert found["accuracy"]["C_v"] == {"visible": 1.0, "infrared": 1.0}
    assert found["accuracy"]["C_r"] == {"visible": 0.0, "infrared": 0.0}
    ratio = 2.5 * 2 * (2 * p - 1 + 2 * p * (1 - p)) / (3 * (1 - p))
    assert found["gradient"] == {"L_M": {"mean": pytest.approx(ratio, rel=1e-5), "std": pytest.approx(0, abs=1e-5)}}
    assert not model.training and model.scale.grad is None


def test_measuring_leaves_the_network_as_it_is_and_is_the_same_each_time(tmp_path):
    project, config = make_project(tmp_path, ("synth_sysu",)), small_run("b_ml_cc")
    images = TrainingImages(PackedStore.open(project / "data/packed/synth_sysu"), ["train"], 1, torch.device("cpu"))
    model = build_model(config.resolved(), images.n_classes, None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = classifier_agreement(model, images, config)
    assert found["gradient"].keys() == {"L_sid", "L_M", "L_cc"} and found == classifier_agreement(model, images, config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
