"""Encoders and encoder-decoders for text of `transformers`."""

from __future__ import annotations

from tests.roles.architectures.decoders import SMALL, TOKENS
from tests.roles.architectures.table import Architecture

BERT = {**SMALL, **TOKENS, "max_position_embeddings": 6}
HALVES = {
    "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12,
}  # fmt: skip
BART = {**HALVES, **TOKENS, "max_position_embeddings": 6}
T5 = {
    "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "vocab_size": 11,
    "decoder_start_token_id": 0,
}  # fmt: skip

ENCODERS = {
    "BERT": Architecture("BertForSequenceClassification", """
        embedding  *.embeddings.*_embeddings.weight
        matrix     *.self.*.weight *.dense.weight
        norm       *.LayerNorm.*
        bias       *.self.*.bias *.dense.bias classifier.bias
        head       classifier.weight
    """, BERT),
    "RoBERTa": Architecture("RobertaForMaskedLM", """
        embedding  *.embeddings.*_embeddings.weight
        matrix     *.self.*.weight *.dense.weight
        norm       *.LayerNorm.* lm_head.layer_norm.*
        bias       *.self.*.bias *.dense.bias lm_head.bias lm_head.decoder.bias
        head       lm_head.decoder.weight
    """, {**BERT, "tie_word_embeddings": False}),
    "ALBERT": Architecture("AlbertForMaskedLM", """
        head       *.word_embeddings.weight
        embedding  *.position_embeddings.weight *.token_type_embeddings.weight
        matrix     *_mapping_in.weight *.attention.[qkvd]*.weight *.ffn*.weight
        matrix     predictions.dense.weight
        norm       *.LayerNorm.* *.full_layer_layer_norm.*
        bias       *_mapping_in.bias *.attention.[qkvd]*.bias *.ffn*.bias predictions.*e.bias
        bias       predictions.bias
    """, {**BERT, "embedding_size": 4}),
    "ELECTRA": Architecture("ElectraForPreTraining", """
        embedding  *.embeddings.*_embeddings.weight
        matrix     *.embeddings_project.weight *.self.*.weight *.dense.weight
        norm       *.LayerNorm.*
        bias       *.embeddings_project.bias *.self.*.bias *.dense.bias *.dense_prediction.bias
        head       *.dense_prediction.weight
    """, {**BERT, "embedding_size": 4}),
    "DeBERTa-v2": Architecture("DebertaV2ForTokenClassification", """
        embedding  *.embeddings.*_embeddings.weight *.rel_embeddings.weight
        matrix     *.self.*_proj.weight *.dense.weight
        conv       *.conv.conv.weight
        norm       *.LayerNorm.*
        bias       *.self.*_proj.bias *.dense.bias *.conv.conv.bias classifier.bias
        head       classifier.weight
    """, {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
          "position_buckets": 4, "conv_kernel_size": 3}),
    "DistilBERT": Architecture("DistilBertForSequenceClassification", """
        embedding  *.embeddings.*_embeddings.weight
        matrix     *_lin.weight *.lin?.weight pre_classifier.weight
        norm       *.LayerNorm.* *_layer_norm.*
        bias       *_lin.bias *.lin?.bias pre_classifier.bias classifier.bias
        head       classifier.weight
    """, {"n_layers": 2, "dim": 8, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 6,
          "vocab_size": 11, "pad_token_id": 0}),
    "ModernBERT": Architecture("ModernBertForMaskedLM", """
        embedding  *.tok_embeddings.weight
        fused_qkv  *.Wqkv.weight
        matrix     *.Wo.weight *.Wi.weight head.dense.weight
        norm       *norm.weight
        bias       decoder.bias
        head       decoder.weight
    """, {**SMALL, **TOKENS, "cls_token_id": 1, "sep_token_id": 2, "tie_word_embeddings": False}),
    "Longformer": Architecture("LongformerForQuestionAnswering", """
        embedding  *.embeddings.*_embeddings.weight
        matrix     *.self.*.weight *.dense.weight
        norm       *.LayerNorm.*
        bias       *.self.*.bias *.dense.bias qa_outputs.bias
        head       qa_outputs.weight
    """, {**BERT, "attention_window": 4}),
    "CANINE": Architecture("CanineForSequenceClassification", """
        embedding  *.HashBucketCodepointEmbedder_?.weight *_embeddings.weight
        matrix     *.self.*.weight *.dense.weight
        conv       *.conv.weight
        norm       *.LayerNorm.*
        bias       *.self.*.bias *.dense.bias *.conv.bias classifier.bias
        head       classifier.weight
    """, {**SMALL, "max_position_embeddings": 16, "local_transformer_stride": 4}),
    "Funnel": Architecture("FunnelForMaskedLM", """
        head       *.word_embeddings.weight
        embedding  *.seg_embed
        matrix     *.r_kernel *.attention.?_head.weight *.post_proj.weight *.linear_?.weight
        norm       *.layer_norm.*
        bias       *.r_?_bias *.attention.?_head.bias *.post_proj.bias *.linear_?.bias lm_head.bias
    """, {"vocab_size": 11, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 12,
          "block_sizes": [1, 1], "num_decoder_layers": 1}),
    "XLM": Architecture("XLMWithLMHeadModel", """
        head       transformer.embeddings.weight
        embedding  *.position_embeddings.weight *.lang_embeddings.weight
        matrix     *_lin.weight *.lin?.weight
        norm       *.layer_norm*
        bias       *_lin.bias *.lin?.bias pred_layer.proj.bias
    """, {"emb_dim": 8, "n_layers": 2, "n_heads": 2, "n_langs": 2, "max_position_embeddings": 6,
          "vocab_size": 11, "pad_index": 0}),
    "T5": Architecture("T5ForConditionalGeneration", """
        head       shared.weight
        embedding  *.relative_attention_bias.weight
        matrix     *Attention.[qkvo].weight *.DenseReluDense.w*.weight
        norm       *layer_norm.weight
    """, {**T5, "feed_forward_proj": "gated-gelu"}),
    "Switch": Architecture("SwitchTransformersForConditionalGeneration", """
        head       shared.weight
        embedding  *.relative_attention_bias.weight
        matrix     *Attention.[qkvo].weight *.w[io].weight
        router     *.router.classifier.weight
        norm       *layer_norm.weight
    """, {**T5, "num_decoder_layers": 2, "num_experts": 3, "num_sparse_encoder_layers": 1,
          "num_sparse_decoder_layers": 1}),
    "BART": Architecture("BartForSequenceClassification", """
        embedding  *.shared.weight *.embed_positions.weight
        matrix     *_attn.*_proj.weight *.fc?.weight classification_head.dense.weight
        norm       *norm*
        bias       *_attn.*_proj.bias *.fc?.bias classification_head.*.bias
        head       classification_head.out_proj.weight
    """, BART),
    "NLLB-MoE": Architecture("NllbMoeForConditionalGeneration", """
        head       *.shared.weight
        matrix     *_proj.weight *.fc?.weight
        router     *.router.classifier.weight
        norm       *norm.*
        bias       *_proj.bias *.fc?.bias
    """, {**BART, "num_experts": 3, "encoder_sparse_step": 2, "decoder_sparse_step": 2}),
    "Perceiver": Architecture("PerceiverForSequenceClassification", """
        embedding  *.embeddings.weight *.position_embeddings.weight *.latents *.position_embeddings
        matrix     *.self.[qkv]*.weight *.dense*.weight
        norm       *.layernorm*
        bias       *.self.[qkv]*.bias *.dense*.bias *.final_layer.bias
        head       *.final_layer.weight
    """, {"num_latents": 3, "d_latents": 8, "d_model": 8, "num_blocks": 1,
          "num_self_attends_per_block": 1, "num_self_attention_heads": 2,
          "num_cross_attention_heads": 2, "max_position_embeddings": 6, "vocab_size": 11}),
}  # fmt: skip
