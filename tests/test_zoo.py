"""Every torchvision classification, segmentation and video model: the same forward to the bit.

By default one model of each family, small, but for MViT, which takes no small clip; `pytest -m slow` runs
them all.
"""

import pytest
import torch
from torch.utils import _pytree as pytree
from torchvision import models

import fxprop

pytestmark = pytest.mark.usefixtures("memory_given_back")

FAMILIES = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t "
    "mnasnet0_5 mobilenet_v2 mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d "
    "shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11_bn vit_b_32 wide_resnet50_2 fcn_resnet50 "
    "deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large r3d_18 mc3_18 r2plus1d_18 swin3d_t s3d"
).split()


def all_names():
    # detection and optical flow models have control flow that torch.fx cannot trace
    kinds = (models, models.segmentation, models.video)
    return [name for kind in kinds for name in models.list_models(kind)]


def input_shape(name, model):
    if name.startswith("mvit"):
        return (1, 3, 16, 224, 224)
    if name.startswith("swin3d"):
        return (1, 3, 4, 64, 64)
    if name == "s3d":
        return (1, 3, 16, 224, 224)
    if name in ("mc3_18", "r3d_18", "r2plus1d_18"):
        return (2, 3, 4, 32, 32)
    if name.startswith("vit"):
        return (1, 3, model.image_size, model.image_size)
    side = {"inception_v3": 299, "maxvit_t": 224}.get(name, 64)
    return (1 if name == "maxvit_t" else 2, 3, side, side)


def check(name):
    arguments = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name in models.list_models(models.segmentation):
        arguments["weights_backbone"] = None
    torch.manual_seed(0)
    model = models.get_model(name, **arguments)
    x = torch.randn(input_shape(name, model))
    gm, report = fxprop.transform(model, 0.1, (x,))
    assert list(gm.state_dict()) == list(model.state_dict())
    assert any(layer.status == "rewritten" for layer in report.layers)
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    for training in (False, True):
        outputs = []
        for module in (model, gm):
            for key, buffer in model.named_buffers():
                buffer.copy_(buffers[key])  # running statistics as they were
            torch.manual_seed(1)
            output = module.train(training)(x)
            # without its graph, which for a large model is gigabytes
            outputs.append(pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, output))
        assert type(outputs[0]) is type(outputs[1])
        ours, theirs = map(pytree.tree_leaves, outputs)
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_is_bit_equal(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(all_names()) - set(FAMILIES)))
def test_forward_is_bit_equal_in_the_whole_zoo(name):
    check(name)
