"""Decoder-only language models of `transformers`."""

from __future__ import annotations

from tests.roles.architectures.table import Architecture

SMALL = {
    "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12
}  # fmt: skip
TOKENS = {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**SMALL, **TOKENS, "num_key_value_heads": 1}
GPT2 = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 6, **TOKENS}

DECODERS = {
    "GPT-2": Architecture("GPT2LMHeadModel", """
        head       *.wte.weight
        embedding  *.wpe.weight
        fused_qkv  *.c_attn.weight
        matrix     *.c_proj.weight *.c_fc.weight
        norm       *.ln_?.*
        bias       *.c_*.bias
    """, GPT2),
    "GPT-Neo": Architecture("GPTNeoForCausalLM", """
        head       *.wte.weight
        embedding  *.wpe.weight
        matrix     *.attention.*_proj.weight *.mlp.c_*.weight
        norm       *.ln_?.*
        bias       *_proj.bias *.c_fc.bias
    """, {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 6,
          "attention_types": [[["global", "local"], 1]], **TOKENS}),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", """
        embedding  *.embed_in.weight
        fused_qkv  *.query_key_value.weight
        matrix     *.dense*.weight
        norm       *norm.*
        bias       *.query_key_value.bias *.dense*.bias
        head       lm_head.weight
    """, {**SMALL, **TOKENS}),
    "GPT-J": Architecture("GPTJForCausalLM", """
        embedding  *.wte.weight
        matrix     *.attn.*_proj.weight *.mlp.fc_*.weight
        norm       *.ln_?.*
        bias       *.mlp.fc_*.bias lm_head.bias
        head       lm_head.weight
    """, {**GPT2, "rotary_dim": 4}),
    "OPT": Architecture("OPTForCausalLM", """
        head       *.embed_tokens.weight
        embedding  *.embed_positions.weight
        matrix     *.project_in.weight *.project_out.weight *.self_attn.*.weight *.fc?.weight
        norm       *layer_norm.*
        bias       *.self_attn.*.bias *.fc?.bias
    """, {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "ffn_dim": 12,
          "word_embed_proj_dim": 4, "max_position_embeddings": 6, **TOKENS}),
    "BLOOM": Architecture("BloomForCausalLM", """
        head       *.word_embeddings.weight
        fused_qkv  *.query_key_value.weight
        matrix     *.dense*.weight
        norm       *layernorm.* *.ln_f.*
        bias       *.query_key_value.bias *.dense*.bias
    """, {"hidden_size": 8, "n_layer": 2, "n_head": 2, **TOKENS}),
    "Falcon": Architecture("FalconForCausalLM", """
        head       *.word_embeddings.weight
        fused_qkv  *.query_key_value.weight
        matrix     *.dense*.weight
        norm       *layernorm.* *.ln_f.*
    """, {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, **TOKENS}),
    "Llama": Architecture("LlamaForCausalLM", """
        embedding  *.embed_tokens.weight
        matrix     *_proj.weight
        norm       *norm.weight
        head       lm_head.weight
    """, LLAMA),
    "Qwen2": Architecture("Qwen2ForCausalLM", """
        embedding  *.embed_tokens.weight
        matrix     *_proj.weight
        bias       *_proj.bias
        norm       *norm.weight
        head       lm_head.weight
    """, LLAMA),
    "Qwen3": Architecture("Qwen3ForCausalLM", """
        embedding  *.embed_tokens.weight
        matrix     *_proj.weight
        norm       *norm.weight
        head       lm_head.weight
    """, LLAMA),
    "Gemma 2": Architecture("Gemma2ForCausalLM", """
        head       *.embed_tokens.weight
        matrix     *_proj.weight
        norm       *norm.weight
    """, {**LLAMA, "head_dim": 4}),
    "Phi-3": Architecture("Phi3ForCausalLM", """
        embedding  *.embed_tokens.weight
        fused_qkv  *.qkv_proj.weight
        matrix     *.o_proj.weight *.gate_up_proj.weight *.down_proj.weight
        norm       *norm.weight
        head       lm_head.weight
    """, LLAMA),
    "Cohere": Architecture("CohereForCausalLM", """
        head       *.embed_tokens.weight
        matrix     *_proj.weight
        norm       *norm.weight
    """, {**LLAMA, "use_qk_norm": True}),
    "MPT": Architecture("MptForCausalLM", """
        head       *.wte.weight
        fused_qkv  *.Wqkv.weight
        matrix     *_proj.weight
        norm       *.norm_?.weight
    """, {"d_model": 8, "n_heads": 2, "n_layers": 2, "max_seq_len": 6, "vocab_size": 11}),
    "Mixtral": Architecture("MixtralForCausalLM", """
        embedding  *.embed_tokens.weight
        matrix     *.self_attn.*.weight
        router     *.gate.weight
        experts    *.experts.*
        norm       *norm.weight
        head       lm_head.weight
    """, {**LLAMA, "num_local_experts": 3}),
    "Qwen2-MoE": Architecture("Qwen2MoeForCausalLM", """
        embedding  *.embed_tokens.weight
        matrix     *.self_attn.*.weight *.shared_expert.*.weight
        bias       *.self_attn.*.bias
        router     *.gate.weight *.shared_expert_gate.weight
        experts    *.experts.*
        norm       *norm.weight
        head       lm_head.weight
    """, {**LLAMA, "num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 6,
          "shared_expert_intermediate_size": 6}),
    "DeepSeek-V3": Architecture("DeepseekV3ForCausalLM", """
        embedding  *.embed_tokens.weight
        matrix     *.self_attn.*_proj*.weight *.mlp.*_proj.weight
        router     *.gate.weight
        experts    *.experts.*
        norm       *norm.weight
        head       lm_head.weight
    """, {**LLAMA, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
          "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 6,
          "q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
          "v_head_dim": 4}),
    "gpt-oss": Architecture("GptOssForCausalLM", """
        embedding  *.embed_tokens.weight
        matrix     *.self_attn.*.weight
        bias       *.self_attn.*.bias *.router.bias *.experts.*_bias
        other      *.sinks
        router     *.router.weight
        experts    *.experts.*_proj
        norm       *norm.weight
        head       lm_head.weight
    """, {**LLAMA, "num_local_experts": 3, "head_dim": 4}),
    "Jamba": Architecture("JambaForCausalLM", """
        embedding  *.embed_tokens.weight
        matrix     *_proj.weight
        bias       *.conv1d.bias *.dt_proj.bias
        other      *.A_log *.D
        depthwise  *.conv1d.weight
        router     *.router.weight
        experts    *.experts.*
        norm       *norm.weight
        head       lm_head.weight
    """, {**LLAMA, "num_hidden_layers": 4, "num_experts": 3, "attn_layer_period": 2,
          "attn_layer_offset": 1, "mamba_dt_rank": 3, "mamba_d_state": 4}),
    "Mamba": Architecture("MambaForCausalLM", """
        head       *.embeddings.weight
        matrix     *_proj.weight
        bias       *.conv1d.bias *.dt_proj.bias
        other      *.A_log *.D
        depthwise  *.conv1d.weight
        norm       *.norm*.weight
    """, {"num_hidden_layers": 2, "hidden_size": 8, "state_size": 4, **TOKENS}),
    "Mamba-2": Architecture("Mamba2ForCausalLM", """
        embedding  *.embeddings.weight
        matrix     *_proj.weight
        bias       *.conv1d.bias *.dt_bias
        other      *.A_log *.D
        depthwise  *.conv1d.weight
        norm       *.norm*.weight
        head       lm_head.weight
    """, {"num_hidden_layers": 2, "hidden_size": 8, "state_size": 4, "head_dim": 4,
          "num_heads": 4, "n_groups": 1, **TOKENS}),
    "RWKV": Architecture("RwkvForCausalLM", """
        embedding  *.embeddings.weight
        matrix     *.key.weight *.value.weight *.receptance.weight *.output.weight
        other      *.time_*
        norm       *.pre_ln.* *.ln?.* *.ln_out.*
        head       head.weight
    """, {**SMALL, "attention_hidden_size": 8, **TOKENS}),
    "RecurrentGemma": Architecture("RecurrentGemmaForCausalLM", """
        head       *.embed_tokens.weight
        matrix     *_proj.weight *.linear_*.weight
        bias       *_proj.bias *.linear_*.bias *.conv_1d.bias *_gate_bias
        depthwise  *.conv_1d.weight
        stack      *_gate_weight
        other      *.recurrent_param
        norm       *norm.weight
    """, {**LLAMA, "num_hidden_layers": 3, "lru_width": 8}),
    "XLNet": Architecture("XLNetLMHeadModel", """
        head       *.word_embedding.weight
        embedding  *.mask_emb *.seg_embed
        matrix     *.rel_attn.[qkvor] *.ff.layer_?.weight
        bias       *.r_?_bias *.ff.layer_?.bias lm_loss.bias
        norm       *.layer_norm.*
    """, {"d_model": 8, "n_layer": 2, "n_head": 2, "d_inner": 12, **TOKENS}),
}  # fmt: skip
