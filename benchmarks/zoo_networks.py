"""The networks of `zoo.py`: of torchvision and timm, with random weights of one seed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from methods.training import recalibrate

CLASSES = 100


class Entry(NamedTuple):
    """A network by the name that its source knows, and the side of its images in pixels."""

    source: str
    name: str
    pixels: int


TORCHVISION = (
    "shufflenet_v2_x0_5 mobilenet_v3_small mnasnet0_5 squeezenet1_1 mobilenet_v3_large mobilenet_v2 efficientnet_b0 "
    "regnet_y_400mf regnet_x_400mf alexnet googlenet resnet18 densenet121 efficientnet_v2_s resnet50 inception_v3 "
    "resnext50_32x4d convnext_tiny vit_b_32 vgg11 swin_t swin_v2_t wide_resnet50_2 vgg16_bn vit_b_16 maxvit_t"
)
TIMM = (
    "mobilenetv3_small_050 lcnet_050 repghostnet_050 ghostnet_050 mobilenetv4_conv_small_050 starnet_s050 "
    "efficientvit_b0 edgenext_xx_small regnetx_002 shvit_s1 mobilevit_xxs levit_128s tf_efficientnet_lite0 "
    "efficientformerv2_s0 ese_vovnet19b_slim_dw rexnet_100 inception_next_atto nf_regnet_b0 fastvit_t8 pvt_v2_b0 "
    "convnextv2_atto xcit_nano_12_p16_224 repvit_m0_9 mobilenetv4_hybrid_medium mixer_s32_224 mobileone_s0 "
    "vit_tiny_patch16_224 deit_tiny_patch16_224 repvgg_a0 hrnet_w18_small poolformer_s12 resnetv2_18 seresnet18 "
    "skresnet18 resnet18d coatnet_nano_rw_224 darknet17 dla34 cspresnet50 res2net50_26w_4s "
    "swin_tiny_patch4_window7_224 vovnet39a"
)
"""Those of the fewest MACs first, for each source."""

SIDES = {"inception_v3": 96, "maxvit_t": 224} | dict.fromkeys(("swin_t", "swin_tiny_patch4_window7_224"), 112)
SIDES |= {"swin_v2_t": 128}
"""The smallest images in pixels, where they are not of 64; Swin's would be padding for the most part."""

ENTRIES = {
    name: Entry(source, name, SIDES.get(name, 64))
    for source, names in (("torchvision", TORCHVISION), ("timm", TIMM))
    for name in names.split()
}


def network(entry: Entry, images: Tensor) -> nn.Module:
    """Build a network whose weights are random, but of a trained one's kind: none is zero or all the same.

    So no branch is off at first, as layer scales and last norms are; norms have the statistics of `images`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        side, kind = entry.pixels, entry.name.split("_")[0]
        if entry.source == "timm":
            import timm

            size = {"img_size": side} if timm.get_pretrained_cfg(entry.name).fixed_input_size else {}
            model = timm.create_model(entry.name, num_classes=CLASSES, **size)
        else:
            import torchvision

            own: dict[str, dict[str, Any]] = {"vit": {"image_size": side}, "maxvit": {"input_size": (side, side)}}
            own |= {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception")}
            model = torchvision.models.get_model(entry.name, num_classes=CLASSES, **own.get(kind, {}))
        with torch.no_grad():
            for name, values in model.named_parameters():
                if values.min() == values.max():
                    values.normal_(0, 0.1) if name.endswith("bias") else values.uniform_(0.5, 1.5)
    recalibrate(model.eval(), images)
    return model
