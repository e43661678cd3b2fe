"""Models of `transformers` for vision, audio and control."""

from __future__ import annotations

from tests.roles.architectures.decoders import SMALL, TOKENS
from tests.roles.architectures.encoders import BERT, HALVES
from tests.roles.architectures.table import Architecture

IMAGE = {**SMALL, "image_size": 4, "patch_size": 2}
SPEECH = {
    **SMALL, "vocab_size": 11, "conv_dim": (4, 4), "conv_stride": (2, 2), "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip

SENSES = {
    "ViT": Architecture("ViTForImageClassification", """
        embedding  *.cls_token *.position_embeddings
        conv       *.projection.weight
        matrix     *.[qkvo]_proj.weight *.fc?.weight
        norm       *.layernorm*
        bias       *.projection.bias *.[qkvo]_proj.bias *.fc?.bias classifier.bias
        head       classifier.weight
    """, IMAGE),
    "BEiT": Architecture("BeitForImageClassification", """
        embedding  *.cls_token *.mask_token *.relative_position_bias_table
        conv       *.projection.weight
        matrix     *.[qkvo]_proj.weight *.fc?.weight
        norm       *.layernorm*
        other      *.lambda_?
        bias       *.projection.bias *.[qvo]_proj.bias *.fc?.bias classifier.bias
        head       classifier.weight
    """, {**IMAGE, "use_mask_token": True, "use_relative_position_bias": True,
          "layer_scale_init_value": 0.1, "vocab_size": 11}),
    "DINOv2": Architecture("Dinov2ForImageClassification", """
        embedding  *.cls_token *.mask_token *.position_embeddings
        conv       *.projection.weight
        matrix     *_proj.weight
        norm       *.layernorm.* *.norm?.*
        other      *.lambda1
        bias       *.projection.bias *_proj.bias classifier.bias
        head       classifier.weight
    """, {**IMAGE, "use_swiglu_ffn": True}),
    "CLIP": Architecture("CLIPModel", """
        other      logit_scale
        embedding  *.token_embedding.weight *.position_embedding.weight *.class_embedding
        conv       *.patch_embedding.weight
        matrix     *_proj.weight *.fc?.weight *_projection.weight
        norm       *norm*
        bias       *_proj.bias *.fc?.bias
    """, {"text_config": BERT, "vision_config": IMAGE, "projection_dim": 4}),
    "SegFormer": Architecture("SegformerForSemanticSegmentation", """
        conv       *_embeddings.proj.weight *.sequence_reduction.weight *.linear_fuse.weight
        depthwise  *.dwconv.weight
        matrix     *.[qkvo]_proj.weight *.fc?.weight *_projections.?.proj.weight
        norm       *norm*
        bias       *.proj.bias *_reduction.bias *.dwconv.bias *_proj.bias *.fc?.bias
        bias       *.classifier.bias
        head       decode_head.classifier.weight
    """, {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [4, 8],
          "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2],
          "mlp_ratios": [2, 2], "decoder_hidden_size": 8}),
    "DETR": Architecture("DetrForObjectDetection", """
        embedding  *.query_position_embeddings.weight
        conv       *.convolution.weight *.input_projection.weight
        matrix     *_proj.weight *.fc?.weight bbox_predictor.layers.[01].weight
        norm       *norm.*
        bias       *_proj.bias *.fc?.bias *.input_projection.bias *_classifier.bias bbox_*.bias
        head       class_labels_classifier.weight bbox_predictor.layers.2.weight
    """, {**HALVES, "num_queries": 3, "use_timm_backbone": False, "use_pretrained_backbone": False,
          "backbone": None}),
    "SAM": Architecture("SamModel", """
        embedding  *.positional_embedding *.pos_embed *.rel_pos_? *_embed.weight
        embedding  *.point_embed.?.weight *.iou_token.weight *.mask_tokens.weight
        conv       *.projection.weight *.neck.conv?.weight *.mask_embed.conv?.weight
        conv       *.upscale_conv?.weight
        fused_qkv  *.qkv.weight
        matrix     *.attn.proj.weight *.[qkv]_proj.weight *.out_proj.weight *.lin?.weight
        matrix     *.layers.0.weight *.proj_in.weight *_mlps.?.proj_out.weight
        norm       *norm*
        bias       *.projection.bias *.conv?.bias *.upscale_conv?.bias *.qkv.bias *.attn.proj.bias
        bias       *_proj.bias *.lin?.bias *.layers.0.bias *.proj_in.bias *.proj_out.bias
        head       *.iou_prediction_head.proj_out.weight
    """, {
        "vision_config": {
            "hidden_size": 8, "output_channels": 4, "num_hidden_layers": 1, "image_size": 8,
            "num_attention_heads": 2, "patch_size": 2, "mlp_dim": 12, "window_size": 2,
            "global_attn_indexes": [0], "num_pos_feats": 2,
        },
        "prompt_encoder_config": {
            "hidden_size": 8, "image_size": 8, "patch_size": 2, "mask_input_channels": 4
        },
        "mask_decoder_config": {
            "hidden_size": 8, "mlp_dim": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
            "iou_head_hidden_dim": 8,
        },
    }),
    "MobileViT": Architecture("MobileViTForImageClassification", """
        conv       *_1x1.convolution.weight *stem.convolution.weight *_kxk.convolution.weight
        conv       *_projection.convolution.weight *.fusion.convolution.weight
        conv       *_exp.convolution.weight
        depthwise  *.conv_3x3.convolution.weight
        matrix     *.attention.attention.*.weight *.dense.weight
        norm       *norm*
        bias       *.attention.attention.*.bias *.dense.bias classifier.bias
        head       classifier.weight
    """, {"image_size": 32, "hidden_sizes": [8, 8, 8], "num_attention_heads": 2,
          "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 8]}),
    "ConvNeXt V2": Architecture("ConvNextV2ForImageClassification", """
        conv       *.patch_embeddings.weight *.downsampling_layer.1.weight
        depthwise  *.dwconv.weight
        matrix     *.pwconv?.weight
        norm       *norm.* *.grn.* *.downsampling_layer.0.*
        bias       *.patch_embeddings.bias *.downsampling_layer.1.bias *.dwconv.bias
        bias       *.pwconv?.bias classifier.bias
        head       classifier.weight
    """, {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2}),
    "Whisper": Architecture("WhisperForConditionalGeneration", """
        conv       *.conv?.weight
        head       *.embed_tokens.weight
        embedding  *.embed_positions.weight
        matrix     *_proj.weight *.fc?.weight
        norm       *norm.*
        bias       *.conv?.bias *_proj.bias *.fc?.bias
    """, {**HALVES, **TOKENS, "num_mel_bins": 4, "max_source_positions": 4,
          "max_target_positions": 4, "decoder_start_token_id": 1}),
    "wav2vec 2.0": Architecture("Wav2Vec2ForCTC", """
        embedding  *.masked_spec_embed
        conv       *.conv_layers.?.conv.weight *.original1
        other      *.original0
        matrix     *.projection.weight *_proj.weight *_dense.weight
        norm       *norm.*
        bias       *.projection.bias *.conv.bias *_proj.bias *_dense.bias lm_head.bias
        head       lm_head.weight
    """, SPEECH),
    "Conformer": Architecture("Wav2Vec2ConformerForSequenceClassification", """
        embedding  *.masked_spec_embed
        conv       *.conv_layers.?.conv.weight *.original1 *.pointwise_conv?.weight
        depthwise  *.depthwise_conv.weight
        other      *.original0
        matrix     *.projection.weight *.linear_*.weight *_dense.weight projector.weight
        norm       *norm.*
        bias       *.projection.bias *.conv.bias *.pos_bias_? *.linear_*.bias *_dense.bias
        bias       projector.bias classifier.bias
        head       classifier.weight
    """, {**SPEECH, "position_embeddings_type": "relative", "classifier_proj_size": 4}),
    "EnCodec": Architecture("EncodecModel", """
        conv       *.conv.*.original1
        other      *.conv.*.original0
        matrix     *.lstm.weight_*
        bias       *.conv.bias *.lstm.bias_*
    """, {"num_filters": 2, "hidden_size": 4, "upsampling_ratios": [2], "codebook_size": 8,
          "codebook_dim": 4, "num_lstm_layers": 1}),
    "PatchTST": Architecture("PatchTSTForPrediction", """
        embedding  *.position_enc
        matrix     *.input_embedding.weight *_proj.weight *.ff.?.weight
        norm       *norm.*
        bias       *.input_embedding.bias *_proj.bias *.ff.?.bias head.projection.bias
        head       head.projection.weight
    """, {"num_input_channels": 2, "context_length": 8, "patch_length": 2, "patch_stride": 2,
          "num_hidden_layers": 1, "d_model": 8, "num_attention_heads": 2, "ffn_dim": 12,
          "prediction_length": 3}),
    "Decision Transformer": Architecture("DecisionTransformerModel", """
        embedding  *.wte.weight *.wpe.weight embed_timestep.weight
        fused_qkv  *.c_attn.weight
        matrix     *.c_proj.weight *.c_fc.weight embed_return.weight embed_state.weight
        matrix     embed_action.weight
        norm       *.ln_* embed_ln.*
        bias       *.c_*.bias embed_return.bias embed_state.bias embed_action.bias predict_*.bias
        head       predict_*.weight
    """, {"state_dim": 3, "act_dim": 2, "hidden_size": 8, "n_layer": 1, "n_head": 2,
          "n_positions": 6, "max_ep_len": 5}),
}  # fmt: skip
