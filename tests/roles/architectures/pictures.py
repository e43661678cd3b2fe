"""Models of `timm` and `torchvision`."""

from __future__ import annotations

from tests.roles.architectures.table import Architecture

TIMM = {
    "ResNet": Architecture("resnet18", """
        conv       conv1.weight layer*.conv?.weight *.downsample.0.weight
        norm       bn1.* *.bn?.* *.downsample.1.*
        bias       fc.bias
        head       fc.weight
    """),
    "ResNeSt": Architecture("resnest14d", """
        conv       conv1.[036].weight *.conv[13].weight *.conv2.conv.weight *.fc?.weight
        conv       *.downsample.1.weight
        norm       bn1.* *.bn?.* conv1.[14].* *.downsample.2.*
        bias       *.fc?.bias fc.bias
        head       fc.weight
    """),
    "ConvNeXt": Architecture("convnext_atto", """
        conv       stem.0.weight *.fc?.weight *.downsample.1.weight
        norm       stem.1.* *norm.* *.downsample.0.*
        other      *.gamma
        depthwise  *.conv_dw.weight
        bias       stem.0.bias *.conv_dw.bias *.fc?.bias *.downsample.1.bias head.fc.bias
        head       head.fc.weight
    """),
    "EfficientNet": Architecture("efficientnet_b0", """
        conv       conv_stem.weight *.conv_reduce.weight *.conv_expand.weight *.conv_pw*.weight
        conv       conv_head.weight
        depthwise  *.conv_dw.weight
        norm       bn?.* *.bn?.*
        bias       *.conv_reduce.bias *.conv_expand.bias classifier.bias
        head       classifier.weight
    """),
    "MobileNetV3": Architecture("mobilenetv3_small_050", """
        conv       conv_stem.weight *.conv_reduce.weight *.conv_expand.weight *.conv_pw*.weight
        conv       *.conv.weight conv_head.weight
        depthwise  *.conv_dw.weight
        norm       bn?.* *.bn?.*
        bias       *.conv_reduce.bias *.conv_expand.bias conv_head.bias classifier.bias
        head       classifier.weight
    """),
    "MLP-Mixer": Architecture("mixer_s32_224", """
        conv       stem.proj.weight
        matrix     *.fc?.weight
        norm       *norm*
        bias       stem.proj.bias *.fc?.bias head.bias
        head       head.weight
    """),
    "gMLP": Architecture("gmlp_ti16_224", """
        conv       stem.proj.weight
        matrix     *.fc?.weight *.gate.proj.weight
        norm       *norm*
        bias       stem.proj.bias *.fc?.bias *.gate.proj.bias head.bias
        head       head.weight
    """),
    "Swin": Architecture("swin_tiny_patch4_window7_224", """
        conv       patch_embed.proj.weight
        embedding  *.relative_position_bias_table
        fused_qkv  *.qkv.weight
        matrix     *.attn.proj.weight *.fc?.weight *.reduction.weight
        norm       *norm*
        bias       *.proj.bias *.qkv.bias *.fc?.bias head.fc.bias
        head       head.fc.weight
    """),
    "ViT of timm": Architecture("vit_tiny_patch16_224", """
        conv       patch_embed.proj.weight
        embedding  cls_token pos_embed
        fused_qkv  *.qkv.weight
        matrix     *.attn.proj.weight *.fc?.weight
        norm       *norm*
        bias       *.proj.bias *.qkv.bias *.fc?.bias head.bias
        head       head.weight
    """),
    "DeiT": Architecture("deit_tiny_distilled_patch16_224", """
        conv       patch_embed.proj.weight
        embedding  cls_token dist_token pos_embed
        fused_qkv  *.qkv.weight
        matrix     *.attn.proj.weight *.fc?.weight
        norm       *norm*
        bias       *.proj.bias *.qkv.bias *.fc?.bias head*.bias
        head       head.weight head_dist.weight
    """),
    "RegNet": Architecture("regnety_002", """
        conv       *.conv.weight *.se.fc?.weight
        norm       *.bn.*
        bias       *.se.fc?.bias head.fc.bias
        head       head.fc.weight
    """),
    "DenseNet": Architecture("densenet121", """
        conv       *.conv?.weight *.conv.weight
        norm       *.norm*
        bias       classifier.bias
        head       classifier.weight
    """),
    "XCiT": Architecture("xcit_nano_12_p8_224", """
        conv       patch_embed.proj.?.0.weight *.token_projection.weight
        embedding  cls_token
        fused_qkv  *.qkv.weight
        matrix     *.attn.proj.weight *.attn.[qkv].weight *.fc?.weight
        depthwise  *.local_mp.conv?.weight
        other      *.gamma? *.temperature
        norm       *norm* *.local_mp.bn.* patch_embed.proj.?.1.*
        bias       *.token_projection.bias *.qkv.bias *.attn.proj.bias *.attn.[qkv].bias
        bias       *.fc?.bias *.conv?.bias head.bias
        head       head.weight
    """),
    "PoolFormer": Architecture("poolformer_s12", """
        conv       *.conv.weight *.fc?.weight
        norm       *norm*
        other      *.scale
        bias       *.conv.bias *.fc?.bias head.fc.bias
        head       head.fc.weight
    """),
    "CaiT": Architecture("cait_xxs24_224", """
        conv       patch_embed.proj.weight
        embedding  cls_token pos_embed
        fused_qkv  *.qkv.weight
        matrix     *.attn.proj*.weight *.attn.[qkv].weight *.fc?.weight
        other      *.gamma_?
        norm       *norm*
        bias       *.proj*.bias *.qkv.bias *.attn.[qkv].bias *.fc?.bias head.bias
        head       head.weight
    """),
    "LeViT": Architecture("levit_128s", """
        conv       stem.conv?.linear.weight
        fused_qkv  *.qkv.linear.weight
        matrix     *.ln.linear.weight *.ln?.linear.weight *.kv.linear.weight
        norm       *.bn.*
        bias       *.attention_biases head*.linear.bias
        head       head.linear.weight head_dist.linear.weight
    """),
    "EdgeNeXt": Architecture("edgenext_xx_small", """
        conv       stem.0.weight *.downsample.1.weight *.token_projection.weight
        depthwise  *.conv_dw.weight *.convs.?.weight
        fused_qkv  *.qkv.weight
        matrix     *.xca.proj.weight *.fc?.weight
        other      *.gamma* *.temperature
        norm       stem.1.* *norm* *.downsample.0.*
        bias       stem.0.bias *.downsample.1.bias *.token_projection.bias *.conv_dw.bias
        bias       *.convs.?.bias *.qkv.bias *.xca.proj.bias *.fc?.bias head.fc.bias
        head       head.fc.weight
    """),
    "EVA-02": Architecture("eva02_tiny_patch14_224", """
        conv       patch_embed.proj.weight
        embedding  cls_token pos_embed
        fused_qkv  *.qkv.weight
        matrix     *.attn.proj.weight *.fc?.weight
        norm       *norm*
        bias       *.proj.bias *.[qv]_bias *.fc?.bias head.bias
        head       head.weight
    """),
    "NFNet": Architecture("nfnet_f0", """
        conv       *conv*.weight *.fc[12].weight
        other      *.gain
        bias       *conv*.bias *.fc[12].bias head.fc.bias
        head       head.fc.weight
    """),
}  # fmt: skip

SEGMENTATION = {"weights": None, "weights_backbone": None}
PLAIN = {"weights": None}

TORCHVISION = {
    "DeepLabV3": Architecture("segmentation.deeplabv3_resnet50", """
        conv       backbone.*conv?.weight *.downsample.0.weight *.convs.?.0.weight
        conv       *.convs.4.1.weight *.project.0.weight classifier.1.weight
        conv       aux_classifier.0.weight
        norm       *bn?.* *.downsample.1.* *.convs.[0-3].1.* *.convs.4.2.* *.project.1.*
        norm       classifier.2.* aux_classifier.1.*
        bias       classifier.4.bias aux_classifier.4.bias
        head       classifier.4.weight aux_classifier.4.weight
    """, {**SEGMENTATION, "aux_loss": True}),
    "FCN": Architecture("segmentation.fcn_resnet50", """
        conv       backbone.*conv?.weight *.downsample.0.weight classifier.0.weight
        norm       *bn?.* *.downsample.1.* classifier.1.*
        bias       classifier.4.bias
        head       classifier.4.weight
    """, SEGMENTATION),
    "LR-ASPP": Architecture("segmentation.lraspp_mobilenet_v3_large", """
        conv       backbone.0.0.weight backbone.16.0.weight *.cbr.0.weight *.scale.1.weight
        conv       backbone.[2-9].block.0.0.weight backbone.1[0-5].block.0.0.weight
        conv       backbone.1.block.1.0.weight *.block.[23].0.weight *.fc?.weight
        depthwise  backbone.1.block.0.0.weight
        depthwise  backbone.[2-9].block.1.0.weight backbone.1[0-5].block.1.0.weight
        norm       backbone.0.1.* backbone.16.1.* *.block.?.1.* *.cbr.1.*
        bias       *.fc?.bias *_classifier.bias
        head       *.low_classifier.weight *.high_classifier.weight
    """, SEGMENTATION),
    "Mask R-CNN": Architecture("detection.maskrcnn_resnet50_fpn", """
        conv       *.body.*conv?.weight *.downsample.0.weight *.fpn.*.weight
        conv       rpn.head.conv.0.0.weight *.mask_head.?.0.weight *.conv5_mask.weight
        norm       *.body.*bn?.* *.downsample.1.*
        matrix     *.box_head.fc?.weight
        bias       *.fpn.*.bias rpn.head.*.bias *.mask_head.?.0.bias *.mask_predictor.*.bias
        bias       *.box_head.*.bias *.box_predictor.*.bias
        head       rpn.head.cls_logits.weight rpn.head.bbox_pred.weight *.cls_score.weight
        head       *.box_predictor.bbox_pred.weight *.mask_fcn_logits.weight
    """, SEGMENTATION),
    "RetinaNet": Architecture("detection.retinanet_resnet50_fpn", """
        conv       *.body.*conv?.weight *.downsample.0.weight *.fpn.*.weight head.*.conv.?.0.weight
        norm       *.body.*bn?.* *.downsample.1.*
        bias       *.fpn.*.bias head.*.bias
        head       *.cls_logits.weight *.bbox_reg.weight
    """, SEGMENTATION),
    "SSD": Architecture("detection.ssd300_vgg16", """
        other      *.scale_weight
        conv       *.features.*.weight *.extra.*.weight
        bias       *.features.*.bias *.extra.*.bias *.module_list.?.bias
        head       *.module_list.?.weight
    """, SEGMENTATION),
    "SqueezeNet": Architecture("squeezenet1_0", """
        conv       features.*.weight
        bias       features.*.bias classifier.1.bias
        head       classifier.1.weight
    """, PLAIN),
    "GoogLeNet": Architecture("googlenet", """
        conv       *.conv.weight
        norm       *.bn.*
        matrix     aux?.fc1.weight
        bias       aux?.fc?.bias fc.bias
        head       aux?.fc2.weight fc.weight
    """, {**PLAIN, "init_weights": False}),
}  # fmt: skip
