"""The network is torchvision's ResNet with the paper's changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional
from torchvision.models import resnet18, resnet50

from danet_core.backbone import ResNet, zero_padded
from danet_core.files import StudyError
from danet_core.model import DANet, pool


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


def test_pooling_equals_loops_over_the_maps_and_their_gradients():
    maps = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0)).relu()
    for pooling, loop in (
        ("average", lambda values: sum(values) / len(values)),
        ("max", lambda values: max(values, key=torch.Tensor.item)),
        ("gem", lambda values: (sum(value**3 for value in values) / len(values)) ** (1 / 3)),
    ):
        mine, theirs = (maps.clone().requires_grad_() for _ in range(2))
        found = pool(mine, pooling, 3.0)
        expected = torch.stack([torch.stack([loop(list(one.flatten())) for one in image]) for image in theirs])
        torch.testing.assert_close(found, expected)
        found.sum().backward(), expected.sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_pooling_on_maps_worked_out_by_hand():
    maps = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]])
    assert pool(maps, "average").tolist() == [[2, 0]]
    assert pool(maps, "max").tolist() == [[3, 0]]
    assert pool(maps, "gem", 3.0)[0].tolist() == pytest.approx([14 ** (1 / 3), 0], abs=1e-5)  # (1 + 27) / 2 = 14
    dead = torch.zeros(1, 1, 2, 2, requires_grad=True)
    pool(dead, "gem", 3.0).sum().backward()
    assert dead.grad.isfinite().all()


@given(seed=st.integers(0, 1000), exponent=st.floats(1, 8))
@settings(max_examples=30)
def test_gem_lies_between_average_and_maximum_and_grows_with_its_exponent(seed, exponent):
    maps = torch.rand(2, 3, 4, 2, generator=torch.Generator().manual_seed(seed))
    low, gem, higher, top = (
        pool(maps, "average"),
        pool(maps, "gem", exponent),
        pool(maps, "gem", exponent + 1),
        pool(maps, "max"),
    )
    for below, above in ((low, gem), (gem, higher), (higher, top)):
        assert (below <= above + 1e-5).all()


def mixed(batch: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 32, 16, generator=torch.Generator().manual_seed(1)), torch.arange(batch) % 2


def weights_file(tmp_path):
    torch.manual_seed(0)
    source = ResNet("resnet18", 8)
    for module in source.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    return path


@pytest.mark.parametrize("streams", ["two", "zero_padding"])
def test_other_streams_ask_for_modalities_and_one_stream_ignores_them(streams):
    images, modalities = mixed()
    with pytest.raises(StudyError, match=f"streams {streams} needs the modality of each image"):
        DANet(6, "resnet18", width=8, streams=streams)(images)
    one = small().eval()
    assert torch.equal(one(images).feat, one(images, modalities).feat)


def test_two_streams_start_as_one_and_send_each_modality_through_its_own_first_layers(tmp_path):
    images, modalities = mixed()
    path = weights_file(tmp_path)
    one = DANet(6, "resnet18", path, width=8).eval()
    two = DANet(6, "resnet18", path, width=8, streams="two").eval()
    torch.testing.assert_close(two.embed(images, modalities)[0], one.embed(images)[0])
    with torch.no_grad():
        two.backbone.conv1_infrared.weight.mul_(-1)
    moved = (two.embed(images, modalities)[0] - one.embed(images)[0]).abs().sum(1) > 1e-4
    assert torch.equal(moved, modalities == 1)
    both = {name.replace("1_infrared", "1") for name in two.backbone.state_dict() if "infrared" in name}
    assert both == {name for name in one.backbone.state_dict() if name.startswith(("conv1", "bn1"))}


def test_two_streams_equal_a_loop_over_the_images_one_by_one(tmp_path):
    images, modalities = mixed()
    modalities = torch.tensor([1, 1, 0, 1, 0, 1])
    torch.manual_seed(4)
    two = DANet(6, "resnet18", width=8, streams="two").eval()
    trunk = two.backbone
    for image, modality, found in zip(images, modalities, trunk(images, modalities), strict=True):
        conv, norm = (trunk.conv1, trunk.bn1) if modality == 0 else (trunk.conv1_infrared, trunk.bn1_infrared)
        maps = trunk.maxpool(trunk.relu(norm(conv(image[None]))))
        expected = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(maps))))[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    alone = trunk(images[:1], modalities[:1])  # a batch of one modality, as evaluation has them
    torch.testing.assert_close(alone[0], trunk(images, modalities)[0], atol=1e-5, rtol=1e-4)


def test_the_batch_statistics_of_one_modality_see_no_image_of_the_other():
    images, modalities = mixed()
    torch.manual_seed(0)
    two = DANet(6, "resnet18", width=8, streams="two").train()
    two(images, modalities)
    for conv, norm, modality in (("conv1", "bn1", 0), ("conv1_infrared", "bn1_infrared", 1)):
        maps = getattr(two.backbone, conv)(images[modalities == modality])
        torch.testing.assert_close(getattr(two.backbone, norm).running_mean, 0.1 * maps.mean((0, 2, 3)))


def test_gradient_reaches_each_entrance_from_its_own_modality_alone():
    images, modalities = mixed()
    torch.manual_seed(0)
    two = DANet(6, "resnet18", width=8, streams="two").eval()  # in training, batch norm mixes the images
    two.embed(images, modalities)[0][modalities == 0].sum().backward()
    assert two.backbone.conv1.weight.grad.abs().sum() > 0
    assert two.backbone.layer1[0].conv1.weight.grad.abs().sum() > 0
    assert two.backbone.conv1_infrared.weight.grad.abs().sum() == 0


def test_zero_padding_puts_grey_into_the_channel_of_the_modality_and_zero_into_the_other():
    images, modalities = mixed()
    padded = zero_padded(images, modalities)
    assert padded.shape == (6, 2, 32, 16)
    for image, modality, found in zip(images, modalities.tolist(), padded, strict=True):
        grey = sum(weight * channel for weight, channel in zip((0.299, 0.587, 0.114), image, strict=True))
        torch.testing.assert_close(found[modality], grey)
        assert (found[1 - modality] == 0).all()


def test_zero_padding_answers_a_grey_image_of_either_modality_as_the_pretrained_network_does(tmp_path):
    path = weights_file(tmp_path)
    one = DANet(6, "resnet18", path, width=8).eval()
    padded = DANet(6, "resnet18", path, width=8, streams="zero_padding").eval()
    assert padded.backbone.conv1.weight.shape == (8, 2, 7, 7)
    grey = mixed()[0][:, :1].expand(-1, 3, -1, -1)
    for modality in (0, 1):
        modalities = torch.full((6,), modality)
        torch.testing.assert_close(padded.embed(grey, modalities)[0], one.embed(grey)[0], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        padded.backbone.conv1.weight[:, 1] = 0  # filters that only see visible light
    assert padded.backbone.conv1(zero_padded(grey, torch.ones(6, dtype=torch.int64))).abs().max() == 0


@pytest.mark.parametrize("streams", ["two", "zero_padding"])
def test_weights_of_another_width_are_refused_by_every_network(tmp_path, streams):
    with pytest.raises(StudyError, match=r"tensor bn1\.bias: expected \(16,\), found \(8,\)"):
        DANet(6, "resnet18", weights_file(tmp_path), width=16, streams=streams)


def test_averaged_classifiers_start_as_the_classifiers_and_move_by_their_momentum():
    torch.manual_seed(0)
    model = DANet(6, "resnet18", width=8, averaged=True)
    images, _ = mixed()
    out = model(images)
    torch.testing.assert_close(out.averaged_visible, out.logits_visible)
    torch.testing.assert_close(out.averaged_infrared, out.logits_infrared)
    assert not out.averaged_visible.requires_grad and not out.averaged_infrared.requires_grad
    start = model.classifier_infrared.weight.detach().clone()
    steps = [torch.randn_like(start) for _ in range(3)]
    expected = start
    for step in steps:
        with torch.no_grad():
            model.classifier_infrared.weight.copy_(step)
        model.update_averages(0.75)
        expected = 0.75 * expected + 0.25 * step
    torch.testing.assert_close(model.averages[1].weight, expected)
    torch.testing.assert_close(model.averages[0].weight, model.classifier_visible.weight)
    assert small()(images).averaged_visible is None


def test_no_entrance_and_no_average_changes_the_first_weights_of_what_is_shared():
    torch.manual_seed(0)
    averaged = DANet(6, "resnet18", width=8, averaged=True, pooling="gem").state_dict()
    for name, tensor in small().state_dict().items():
        assert torch.equal(averaged[name], tensor)
