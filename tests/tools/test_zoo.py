"""About forty networks of torchvision and timm through `tools/zoo.py`; all of them: `make zoo`."""

import pytest

from tools import zoo

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("timm", reason="timm is not installed")

EXPORTED = """
    torchvision cnn resnet resnet18
    torchvision cnn mobilenet_v3 mobilenet_v3_small
    torchvision cnn shufflenet shufflenet_v2_x0_5
    torchvision cnn googlenet googlenet
    torchvision segmentation segmentation lraspp_mobilenet_v3_large
    torchvision detection detection fasterrcnn_mobilenet_v3_large_fpn
    timm cnn convnext test_convnext2
    timm cnn nfnet test_nfnet
    timm cnn efficientnet test_efficientnet_evos
    timm cnn resnest resnest14d
    timm hybrid maxxvit test_maxvit
    timm transformer vision_transformer test_vit2
"""
REMOVED = """
    torchvision cnn alexnet alexnet
    torchvision cnn densenet densenet121
    torchvision cnn efficientnet efficientnet_b0
    torchvision cnn inception inception_v3
    torchvision cnn mnasnet mnasnet0_5
    torchvision cnn regnet_y regnet_y_400mf
    torchvision cnn squeezenet squeezenet1_1
    torchvision cnn convnext convnext_tiny
    timm cnn resnet test_resnet
    timm cnn convnext test_convnext
    timm cnn efficientnet test_efficientnet_gn
    timm cnn efficientnet test_efficientnet_ln
    timm cnn efficientnet tinynet_e
    timm cnn mobilenetv3 mobilenetv4_conv_small_050
    timm cnn mambaout test_mambaout
    timm cnn dla dla46_c
    timm cnn ghostnet ghostnet_050
    timm cnn hgnet hgnetv2_b0
    timm cnn cspnet cs3darknet_s
    timm cnn repghost repghostnet_050
    timm cnn sknet skresnet18
    timm cnn vovnet ese_vovnet19b_slim
    timm cnn starnet starnet_s050
    timm cnn fasternet fasternet_t0
    timm cnn regnet regnetx_002
    timm cnn byobnet repvgg_a0
    timm cnn resnetv2 resnetv2_18
    timm cnn rexnet rexnet_100
    timm hybrid maxxvit test_coatnet
    timm hybrid edgenext edgenext_xx_small
"""


def entries(text):
    return [tuple(line.split()) for line in text.strip().splitlines()]


def examine(entry, onnx):
    row = zoo.new_row(entry)
    zoo.examine_model(entry, row, onnx)
    assert row["status"] == "ok", row["reason"]
    assert row["prunable_share"] > 0.8


@pytest.mark.parametrize("entry", entries(EXPORTED), ids=lambda entry: entry[3])
def test_a_network_is_pruned_effectively_and_exported(entry):
    examine(entry, onnx=True)


@pytest.mark.parametrize("entry", entries(REMOVED), ids=lambda entry: entry[3])
def test_a_network_is_pruned_effectively(entry):
    examine(entry, onnx=False)


def test_the_list_names_every_classifier_and_segmentation_model_of_torchvision():
    from torchvision import models

    listed = {line.split()[3] for line in zoo.MODELS.read_text().splitlines() if line.startswith("torchvision")}
    known = {*models.list_models(module=models), *models.list_models(module=models.segmentation)}
    known |= set(models.list_models(module=models.detection))
    assert known <= listed
