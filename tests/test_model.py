"""The network is torchvision's ResNet with the paper's changes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from torchvision.models import resnet18, resnet34, resnet50

from danet_core.backbone import ResNet, zero_padded
from danet_core.model import DANet, pool

WEIGHTS = "weights.safetensors"


def small(**options) -> DANet:
    torch.manual_seed(0)
    return DANet(6, "resnet18", width=8, **options)


def mixed() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 1, 0, 1, 0, 0])


@pytest.fixture
def weights(tmp_path):
    """A file of one-stream weights with batch statistics that are not the initial ones."""
    torch.manual_seed(5)
    source = ResNet("resnet18", 8)
    for module in source.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
    save_file({**source.state_dict(), "fc.weight": torch.zeros(3, 3)}, tmp_path / WEIGHTS)
    return tmp_path / WEIGHTS


@pytest.mark.parametrize(
    ("name", "reference"), [("resnet18", resnet18), ("resnet34", resnet34), ("resnet50", resnet50)]
)
def test_the_backbone_equals_torchvisions_with_the_last_stride_set_to_one(name, reference):
    torch.manual_seed(0)
    theirs = reference().eval()
    block = theirs.layer4[0]
    (block.conv2 if name == "resnet50" else block.conv1).stride = (1, 1)
    block.downsample[0].stride = (1, 1)
    ours = ResNet(name).eval()
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert ours.state_dict().keys() == state.keys()
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 64, 32)
    maps = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
    expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(maps))))
    torch.testing.assert_close(ours(images), expected)
    assert expected.shape == (2, ours.out_channels, 64 // 16, 32 // 16)


def test_resnet50_gives_2048_features_at_the_papers_image_size():
    with torch.device("meta"):
        model = DANet(395)
        maps = model.backbone(torch.zeros(1, 3, 384, 128))
    assert maps.shape == (1, 2048, 24, 8)
    assert model.neck.num_features == model.classifier.in_features == 2048


def test_all_classifiers_are_bias_free_and_read_the_feature_after_the_neck():
    model = small().train()
    images, _ = mixed()
    output = model(images)
    torch.testing.assert_close(output.feat_bn, model.neck(output.feat))
    for logits, head in (
        (output.logits, model.classifier),
        (output.logits_visible, model.classifier_visible),
        (output.logits_infrared, model.classifier_infrared),
    ):
        assert head.bias is None
        torch.testing.assert_close(logits, functional.linear(output.feat_bn, head.weight))


def test_the_bias_of_the_neck_is_zero_and_stays_so():
    model = small()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(mixed()[0]).logits.square().sum().backward()
    optimizer.step()
    assert (model.neck.bias == 0).all() and (model.neck.weight != 1).any()


def test_first_predictions_are_uniform_so_that_l_id_starts_at_log_c():
    logits = small().train()(torch.randn(64, 3, 32, 32)).logits
    loss = functional.cross_entropy(logits, torch.arange(64) % 6)
    torch.testing.assert_close(loss, torch.tensor(6.0).log(), atol=0.02, rtol=0)


def test_no_option_changes_the_first_weights_of_what_it_shares_with_the_others():
    plain, other = small().state_dict(), small(teacher_ema=0.9, pooling="gem").state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in plain.items())


def test_backbone_weights_are_loaded_and_the_classifier_in_their_file_ignored(weights):
    model, (images, _) = DANet(6, "resnet18", weights, width=8), mixed()
    plain = ResNet("resnet18", 8).eval()
    plain.load_weights(weights)
    assert torch.equal(model.backbone.eval()(images), plain(images))
    assert model.backbone.bn1.running_mean.abs().max() > 0.01


def test_unusable_weights_and_unknown_backbones_are_refused(weights, tmp_path):
    with pytest.raises(ValueError):
        ResNet("resnet51")
    for stem in ("one", "two", "zero_padding"):
        with pytest.raises(ValueError, match="bn1"):  # names the tensor
            DANet(6, "resnet18", weights, width=16, stem=stem)
    with pytest.raises(ValueError, match=r"absent\.safetensors"):
        DANet(6, "resnet18", tmp_path / "absent.safetensors", width=8)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=WEIGHTS):
        DANet(6, "resnet18", weights, width=8)


def test_pooling_and_its_gradient_equal_loops_over_the_maps():
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


def test_generalized_mean_lies_between_average_and_maximum_and_is_finite_on_dead_maps():
    maps = torch.rand(2, 3, 4, 2, generator=torch.Generator().manual_seed(2))
    levels = [pool(maps, "average"), *(pool(maps, "gem", p) for p in (1.5, 3.0, 8.0)), pool(maps, "max")]
    assert all((low <= high + 1e-5).all() for low, high in zip(levels, levels[1:], strict=False))
    dead = torch.zeros(1, 1, 2, 2, requires_grad=True)
    pool(dead, "gem", 3.0).sum().backward()
    assert dead.grad.isfinite().all()
    assert pool(torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), "average").dtype == torch.float32


@pytest.mark.parametrize("stem", ["two", "zero_padding"])
def test_other_stems_need_modalities_and_one_stream_ignores_them(stem):
    images, modalities = mixed()
    with pytest.raises(ValueError):
        small(stem=stem)(images)
    one = small().eval()
    assert torch.equal(one(images).feat, one(images, modalities).feat)


def test_two_streams_start_as_one_and_send_each_modality_through_its_own_first_layers(weights):
    images, modalities = mixed()
    one, two = (DANet(6, "resnet18", weights, width=8, stem=stem).eval() for stem in ("one", "two"))
    torch.testing.assert_close(two.embed(images, modalities)[0], one.embed(images)[0])
    with torch.no_grad():
        two.backbone.conv1_infrared.weight.mul_(-1)
    moved = (two.embed(images, modalities)[0] - one.embed(images)[0]).abs().sum(1) > 1e-4
    assert torch.equal(moved, modalities == 1)
    alone = two.embed(images[2:3], modalities[2:3])[0]  # a batch of one modality, as in evaluation
    torch.testing.assert_close(alone[0], two.embed(images, modalities)[0][2])
    extra = two.backbone.state_dict().keys() - one.backbone.state_dict().keys()
    assert {name.split(".")[0] for name in extra} == {"conv1_infrared", "bn1_infrared"}


def test_batch_statistics_and_gradient_of_a_stem_come_from_its_own_modality():
    images, modalities = mixed()
    two = small(stem="two").train()
    two(images, modalities)
    for conv, norm, modality in (("conv1", "bn1", 0), ("conv1_infrared", "bn1_infrared", 1)):
        maps = getattr(two.backbone, conv)(images[modalities == modality])
        torch.testing.assert_close(getattr(two.backbone, norm).running_mean, 0.1 * maps.mean((0, 2, 3)))
    two.eval().embed(images, modalities)[0][modalities == 0].sum().backward()
    assert two.backbone.conv1.weight.grad.any() and two.backbone.layer1[0].conv1.weight.grad.any()
    assert not two.backbone.conv1_infrared.weight.grad.any()


def test_a_training_batch_of_two_streams_has_equal_numbers_of_both_modalities():
    images, modalities = mixed()
    with pytest.raises(RuntimeError):
        small(stem="two").train()(images[1:], modalities[1:])
    with pytest.raises(RuntimeError):
        small(stem="two").train()(images, torch.zeros_like(modalities))


def test_zero_padding_puts_gray_into_the_channel_of_the_modality_and_zero_into_the_other():
    images, modalities = mixed()
    padded = zero_padded(images, modalities)
    for image, modality, found in zip(images, modalities.tolist(), padded, strict=True):
        gray = sum(weight * channel for weight, channel in zip((0.299, 0.587, 0.114), image, strict=True))
        torch.testing.assert_close(found[modality], gray)
        assert (found[1 - modality] == 0).all()


def test_zero_padding_answers_a_gray_image_of_either_modality_as_one_stream_does(weights):
    one, padded = (DANet(6, "resnet18", weights, width=8, stem=stem).eval() for stem in ("one", "zero_padding"))
    assert padded.backbone.conv1.weight.shape == (8, 2, 7, 7)
    gray = mixed()[0][:, :1].expand(-1, 3, -1, -1)
    for modality in (0, 1):
        found = padded.embed(gray, torch.full((6,), modality))[0]
        torch.testing.assert_close(found, one.embed(gray)[0], atol=1e-5, rtol=1e-4)


def test_teachers_start_as_the_classifiers_and_move_by_their_momentum():
    model = small(teacher_ema=0.75)
    teachers = model(mixed()[0]).teachers
    assert torch.equal(teachers[0], model.classifier_visible.weight) and not teachers[0].requires_grad
    expected = model.classifier_infrared.weight.detach().clone()
    for step in range(3):
        moved = torch.randn(expected.shape, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            model.classifier_infrared.weight.copy_(moved)
        model.update_teachers()
        expected = 0.75 * expected + 0.25 * moved
    torch.testing.assert_close(model.teachers[1].weight, expected)
    torch.testing.assert_close(model.teachers[0].weight, model.classifier_visible.weight)
    assert small()(mixed()[0]).teachers is None


def test_under_autocast_only_the_convolutions_are_narrow():
    model, seen = small(), {}
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.update(maps=output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(mixed()[0])
    assert seen["maps"] == torch.bfloat16
    assert output.feat.dtype == output.feat_bn.dtype == output.logits.dtype == torch.float32
