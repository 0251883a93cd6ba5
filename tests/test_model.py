"""The network is torchvision's ResNet with the paper's changes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from torchvision.models import resnet18, resnet50

from danet_core.backbone import ResNet
from danet_core.files import StudyError
from danet_core.model import DANet


@pytest.mark.parametrize(("name", "reference"), [("resnet18", resnet18), ("resnet50", resnet50)])
def test_the_trunk_equals_torchvisions_with_the_last_stride_set_to_one(name, reference):
    torch.manual_seed(0)
    theirs = reference().eval()
    block = theirs.layer4[0]
    (block.conv1 if name == "resnet18" else block.conv2).stride = (1, 1)
    block.downsample[0].stride = (1, 1)
    ours = ResNet(name).eval()
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")})
    images = torch.randn(2, 3, 64, 32)
    maps = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
    expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(maps))))
    torch.testing.assert_close(ours(images), expected)
    assert expected.shape[-2:] == (64 // 16, 32 // 16)


def test_resnet50_gives_2048_features_at_the_papers_image_size():
    model = DANet(395).eval()
    with torch.inference_mode():
        feat, feat_bn = model.embed(torch.zeros(1, 3, 384, 128))
        maps = model.backbone(torch.zeros(1, 3, 384, 128))
    assert feat.shape == feat_bn.shape == (1, 2048)
    assert maps.shape == (1, 2048, 24, 8)


def small() -> DANet:
    torch.manual_seed(0)
    return DANet(6, "resnet18", width=8)


def test_all_three_classifiers_are_bias_free_and_read_the_feature_after_the_neck():
    model = small().eval()
    out = model(torch.randn(4, 3, 32, 16))
    for logits, head in (
        (out.logits, model.classifier),
        (out.logits_visible, model.classifier_visible),
        (out.logits_infrared, model.classifier_infrared),
    ):
        assert head.bias is None
        torch.testing.assert_close(logits, functional.linear(out.feat_bn, head.weight))


def test_the_neck_has_no_trainable_bias():
    model = small()
    assert not model.neck.bias.requires_grad
    assert (model.neck.bias == 0).all()
    assert model.neck.weight.requires_grad


def test_the_first_predictions_are_uniform_so_that_l_id_starts_at_log_c():
    model = small().train()
    logits = model(torch.randn(64, 3, 32, 16)).logits
    loss = functional.cross_entropy(logits, torch.arange(64) % 6)
    torch.testing.assert_close(loss, torch.tensor(6.0).log(), atol=0.02, rtol=0)


def test_weights_of_a_file_are_the_ones_the_network_starts_from(tmp_path):
    source = ResNet("resnet18", 8)
    path = tmp_path / "weights.safetensors"
    save_file({**source.state_dict(), "fc.weight": torch.zeros(3, 3)}, path)
    model = DANet(6, "resnet18", path, width=8)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], tensor)


def test_weights_of_another_network_are_refused_by_tensor_and_shape(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(ResNet("resnet18", 16).state_dict(), path)
    with pytest.raises(StudyError, match=r"tensor bn1\.bias: expected \(8,\), found \(16,\)"):
        DANet(6, "resnet18", path, width=8)


def test_missing_and_damaged_weights_are_named(tmp_path):
    with pytest.raises(StudyError, match=r"absent\.safetensors are missing"):
        DANet(6, "resnet18", tmp_path / "absent.safetensors", width=8)
    path = tmp_path / "cut.safetensors"
    save_file(ResNet("resnet18", 8).state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StudyError, match=r"cut\.safetensors are damaged"):
        DANet(6, "resnet18", path, width=8)


def test_unknown_backbones_and_single_class_heads_are_refused():
    with pytest.raises(StudyError, match="unknown backbone 'resnet51'"):
        DANet(6, "resnet51")
    with pytest.raises(StudyError, match="at least 2 training identities, found 1"):
        DANet(1, "resnet18", width=8)
