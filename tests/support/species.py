"""Architectures of transformers: what their tiny models need, and which of their weights are masked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HIDDEN, INNER, VOCABULARY, LABELS, EXPERTS = 32, 64, 96, 16, 4

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embed_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner", "dff"), INNER),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads",), 2),
    **dict.fromkeys(("num_key_value_heads",), 1),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels"), 16),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 48),
    "shared_expert_intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "type_vocab_size": 2,
    "max_position_embeddings": 64,
    "image_size": 16,
    "patch_size": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "decoder_start_token_id": 2,
}


@dataclass(frozen=True)
class Species:
    """An architecture.

    Attributes
    ----------
    kind : str
        Class in transformers.
    masked : str
        The last parts of the stored names of the layers that are pruned, such as ``"q_proj fc1"``.
    dense : str
        The same of all weights that hold matrices as large as a block and stay dense.
    experts : str
        The same of what only ``mask`` masks: matrices of experts, which are one parameter in the model.
    called : {"tokens", "both", "images", "features", "audio"}
        What its forward pass takes; "both" are tokens for encoder and decoder.
    config : mapping
        What its configuration needs beside ``SIZES``.
    parts : mapping of str to mapping
        The same for the configurations inside it.
    """

    kind: str
    masked: str
    dense: str
    experts: str = ""
    called: str = "tokens"
    config: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


ZOO: dict[str, Species] = {
    "llama": Species(
        "LlamaForCausalLM", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", "embed_tokens lm_head"
    ),
    "gpt2": Species("GPT2LMHeadModel", "c_attn c_fc c_proj", "wpe wte"),
    "bart": Species(
        "BartForConditionalGeneration",
        "fc1 fc2 k_proj out_proj q_proj v_proj",
        "embed_positions shared",
        called="both",
    ),
    "m2m": Species(
        "M2M100ForConditionalGeneration", "fc1 fc2 k_proj out_proj q_proj v_proj", "shared", called="both"
    ),
    "marian": Species("MarianMTModel", "fc1 fc2 k_proj out_proj q_proj v_proj", "shared", called="both"),
    "ctrl": Species("CTRLLMHeadModel", "Wk Wq Wv dense ffn", "w"),
    "rwkv": Species(
        "RwkvForCausalLM",
        "key output receptance value",
        "embeddings head",
        config={"attention_hidden_size": 32, "context_length": 64},
    ),
    "bert-mlm": Species(
        "BertForMaskedLM",
        "dense key query value",
        "position_embeddings token_type_embeddings word_embeddings",
    ),
    "bert-cls": Species(
        "BertForSequenceClassification",
        "dense key query value",
        "classifier position_embeddings token_type_embeddings word_embeddings",
        config={"num_labels": 16},
    ),
    "bert-pre": Species(
        "BertForPreTraining",
        "dense key query value",
        "position_embeddings seq_relationship token_type_embeddings word_embeddings",
    ),
    "vit": Species(
        "ViTForImageClassification",
        "dense key query value",
        "classifier projection",
        called="images",
        config={"num_labels": 16},
    ),
    "t5": Species(
        "T5ForConditionalGeneration", "k o q v wi wo", "relative_attention_bias shared", called="both"
    ),
    "mixtral": Species(
        "MixtralForCausalLM", "k_proj o_proj q_proj v_proj", "embed_tokens gate lm_head", experts="w1 w2 w3"
    ),
    "qwen2moe": Species(
        "Qwen2MoeForCausalLM",
        "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
        "embed_tokens gate lm_head",
        experts="down_proj gate_proj up_proj",
    ),
    "qwen3moe": Species(
        "Qwen3MoeForCausalLM",
        "k_proj o_proj q_proj v_proj",
        "embed_tokens gate lm_head",
        experts="down_proj gate_proj up_proj",
    ),
    "gptoss": Species("GptOssForCausalLM", "k_proj o_proj q_proj v_proj", "embed_tokens lm_head router"),
    "llama4": Species(
        "Llama4ForCausalLM",
        "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
        "embed_tokens lm_head router",
        config={"intermediate_size_mlp": 64, "attention_chunk_size": 16},
    ),
    "dbrx": Species(
        "DbrxForCausalLM",
        "Wqkv out_proj",
        "layer lm_head wte",
        config={
            "d_model": 32,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deepseek3": Species(
        "DeepseekV3ForCausalLM",
        "down_proj gate_proj kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj up_proj",
        "embed_tokens gate lm_head",
        experts="down_proj gate_proj up_proj",
        config={
            "num_key_value_heads": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "qk_nope_head_dim": 8,
            "head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "granitemoe": Species(
        "GraniteMoeForCausalLM",
        "k_proj o_proj q_proj v_proj",
        "embed_tokens layer lm_head",
        experts="input_linear output_linear",
    ),
    "jamba": Species(
        "JambaForCausalLM",
        "down_proj gate_proj in_proj k_proj o_proj out_proj q_proj up_proj v_proj x_proj",
        "embed_tokens lm_head router",
        experts="down_proj gate_proj up_proj",
        config={
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "opt": Species(
        "OPTForCausalLM",
        "fc1 fc2 k_proj out_proj project_in project_out q_proj v_proj",
        "embed_positions embed_tokens",
        config={"word_embed_proj_dim": 16},
    ),
    "gptneox": Species(
        "GPTNeoXForCausalLM", "dense dense_4h_to_h dense_h_to_4h query_key_value", "embed_in embed_out"
    ),
    "gptj": Species(
        "GPTJForCausalLM",
        "fc_in fc_out k_proj out_proj q_proj v_proj",
        "lm_head wte",
        config={"rotary_dim": 8},
    ),
    "bloom": Species(
        "BloomForCausalLM", "dense dense_4h_to_h dense_h_to_4h query_key_value", "word_embeddings"
    ),
    "falcon": Species(
        "FalconForCausalLM", "dense dense_4h_to_h dense_h_to_4h query_key_value", "word_embeddings"
    ),
    "phi3": Species("Phi3ForCausalLM", "down_proj gate_up_proj o_proj qkv_proj", "embed_tokens lm_head"),
    "gemma2": Species(
        "Gemma2ForCausalLM", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", "embed_tokens"
    ),
    "gemma3": Species(
        "Gemma3ForCausalLM", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", "embed_tokens"
    ),
    "starcoder2": Species("Starcoder2ForCausalLM", "c_fc c_proj k_proj o_proj q_proj v_proj", "embed_tokens"),
    "mamba": Species("MambaForCausalLM", "in_proj out_proj x_proj", "embeddings", config={"state_size": 8}),
    "nemotronh": Species(
        "NemotronHForCausalLM",
        "down_proj in_proj k_proj o_proj out_proj q_proj up_proj v_proj",
        "embeddings gate lm_head",
        experts="down_proj up_proj",
        config={
            "hybrid_override_pattern": "M*-E",
            "num_hidden_layers": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 8,
            "moe_shared_expert_intermediate_size": 48,
        },
    ),
    "switch": Species(
        "SwitchTransformersForConditionalGeneration",
        "k o q v wi wo",
        "classifier relative_attention_bias shared",
        called="both",
        config={"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    "hunyuanmoe": Species(
        "HunYuanMoEV1ForCausalLM",
        "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
        "embed_tokens lm_head wg",
        experts="down_proj gate_proj up_proj",
    ),
    "olmoe": Species(
        "OlmoeForCausalLM",
        "k_proj o_proj q_proj v_proj",
        "embed_tokens gate lm_head",
        experts="down_proj gate_proj up_proj",
    ),
    "phimoe": Species(
        "PhimoeForCausalLM", "k_proj o_proj q_proj v_proj", "embed_tokens gate lm_head", experts="w1 w2 w3"
    ),
    "electra": Species(
        "ElectraForMaskedLM",
        "dense embeddings_project key query value",
        "position_embeddings token_type_embeddings word_embeddings",
        config={"embedding_size": 16},
    ),
    "roberta": Species(
        "RobertaForSequenceClassification",
        "dense key query value",
        "out_proj position_embeddings token_type_embeddings word_embeddings",
        config={"num_labels": 16},
    ),
    "distilbert": Species(
        "DistilBertForMaskedLM",
        "k_lin lin1 lin2 out_lin q_lin v_lin vocab_transform",
        "position_embeddings word_embeddings",
    ),
    "albert": Species(
        "AlbertForMaskedLM",
        "dense embedding_hidden_mapping_in ffn ffn_output key query value",
        "position_embeddings token_type_embeddings word_embeddings",
        config={"embedding_size": 16},
    ),
    "deberta": Species(
        "DebertaV2ForMaskedLM",
        "dense key_proj query_proj value_proj",
        "position_embeddings token_type_embeddings word_embeddings",
    ),
    "xlm": Species(
        "XLMWithLMHeadModel",
        "k_lin lin1 lin2 out_lin q_lin v_lin",
        "embeddings position_embeddings",
        config={"emb_dim": 32},
    ),
    "whisper": Species(
        "WhisperForConditionalGeneration",
        "conv1 conv2 fc1 fc2 k_proj out_proj q_proj v_proj",
        "embed_positions embed_tokens",
        called="features",
        config={"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
    ),
    "wav2vec2": Species(
        "Wav2Vec2ForCTC",
        "conv intermediate_dense k_proj out_proj output_dense projection q_proj v_proj",
        "lm_head",
        called="audio",
        config={
            "conv_dim": (16, 16),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    "resnet": Species(
        "ResNetForImageClassification",
        "convolution",
        "classifier",
        called="images",
        config={
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [2, 2],
            "layer_type": "basic",
            "num_labels": 16,
        },
    ),
    "convnext": Species(
        "ConvNextForImageClassification",
        "downsampling_layer pwconv1 pwconv2",
        "classifier patch_embeddings",
        called="images",
        config={"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 16},
    ),
    "swin": Species(
        "SwinForImageClassification",
        "dense key query reduction value",
        "classifier projection",
        called="images",
        config={
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
            "patch_size": 2,
            "num_labels": 16,
            "image_size": 16,
        },
    ),
    "dinov2": Species(
        "Dinov2ForImageClassification",
        "dense key query value weights_in weights_out",
        "classifier projection",
        called="images",
        config={"num_labels": 16, "use_swiglu_ffn": True},
    ),
    "clip": Species(
        "CLIPVisionModelWithProjection",
        "fc1 fc2 k_proj out_proj q_proj v_proj visual_projection",
        "patch_embedding position_embedding",
        called="images",
        config={"projection_dim": 16},
    ),
    "llava": Species(
        "LlavaForConditionalGeneration",
        "down_proj fc1 fc2 gate_proj k_proj linear_1 linear_2 o_proj out_proj q_proj up_proj v_proj",
        "embed_tokens lm_head patch_embedding position_embedding",
        config={"image_token_index": 95},
        parts={"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}},
    ),
    "qwen2vl": Species(
        "Qwen2VLForConditionalGeneration",
        "down_proj fc1 fc2 gate_proj k_proj mlp o_proj proj q_proj qkv up_proj v_proj",
        "embed_tokens lm_head proj",
        parts={
            "text_config": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
            },
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
        },
    ),
    "qwen3vlmoe": Species(
        "Qwen3VLMoeForConditionalGeneration",
        "k_proj linear_fc1 linear_fc2 o_proj proj q_proj qkv v_proj",
        "embed_tokens gate lm_head pos_embed proj",
        parts={
            "text_config": {},
            "vision_config": {"depth": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        },
    ),
    "gpt2encdec": Species(
        "EncoderDecoderModel",
        "c_attn c_fc c_proj dense key q_attn query value",
        "position_embeddings token_type_embeddings word_embeddings wpe wte",
        called="both",
        config={"decoder_start_token_id": 0, "pad_token_id": 2},
        parts={
            "encoder": {"model_type": "bert"},
            "decoder": {"model_type": "gpt2", "is_decoder": True, "add_cross_attention": True},
        },
    ),
    "phi4mm": Species(
        "Phi4MultimodalForCausalLM",
        "conv down_proj down_proj_for_speech down_proj_for_vision_speech ext_pw_conv_1d fc1 "
        "fc2 gate_up_proj img_projection_down img_projection_up k_proj o_proj out out_proj "
        "pw_conv q_proj qkv_proj up_proj_for_speech up_proj_for_vision_speech v_proj",
        "bias_values embed_tokens lm_head patch_embedding position_embedding",
        parts={
            "vision_config": {"crop_size": 16},
            "audio_config": {
                "num_blocks": 1,
                "nemo_conv_channels": 16,
                "ext_pw_out_channel": 32,
                "input_size": 16,
            },
        },
    ),
    "gemma3n": Species(
        "Gemma3nForCausalLM",
        "altup_projections altup_unembed_projections down_proj gate_proj k_proj linear_left "
        "linear_right o_proj per_layer_input_gate per_layer_model_projection "
        "per_layer_projection q_proj up_proj v_proj",
        "embed_tokens embed_tokens_per_layer modality_router",
        config={
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 96,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0, 0.0],
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "imagegpt": Species(
        "ImageGPTForCausalImageModeling", "c_attn c_fc c_proj", "lm_head wpe wte", config={"n_positions": 64}
    ),
    "openai-gpt": Species("OpenAIGPTLMHeadModel", "c_attn c_fc c_proj", "positions_embed tokens_embed"),
    "gptbigcode": Species("GPTBigCodeForCausalLM", "c_attn c_fc c_proj", "wpe wte"),
    "gptneo": Species(
        "GPTNeoForCausalLM",
        "c_fc c_proj k_proj out_proj q_proj v_proj",
        "wpe wte",
        config={"attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "qwen2": Species(
        "Qwen2ForCausalLM", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", "embed_tokens lm_head"
    ),
    "qwen3": Species(
        "Qwen3ForCausalLM", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", "embed_tokens lm_head"
    ),
    "qwen3next": Species(
        "Qwen3NextForCausalLM",
        "down_proj gate_proj in_proj_qkvz k_proj o_proj out_proj q_proj up_proj v_proj",
        "embed_tokens gate lm_head",
        experts="down_proj gate_proj up_proj",
        config={
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "mistral": Species(
        "MistralForCausalLM",
        "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
        "embed_tokens lm_head",
    ),
    "cohere": Species(
        "CohereForCausalLM", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", "embed_tokens"
    ),
    "glm4": Species(
        "Glm4ForCausalLM", "down_proj gate_up_proj k_proj o_proj q_proj v_proj", "embed_tokens lm_head"
    ),
    "stablelm": Species(
        "StableLmForCausalLM",
        "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
        "embed_tokens lm_head",
    ),
    "olmo2": Species(
        "Olmo2ForCausalLM", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", "embed_tokens lm_head"
    ),
    "phi": Species("PhiForCausalLM", "dense fc1 fc2 k_proj q_proj v_proj", "embed_tokens lm_head"),
    "smollm3": Species(
        "SmolLM3ForCausalLM", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", "embed_tokens"
    ),
    "granite": Species(
        "GraniteForCausalLM",
        "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
        "embed_tokens lm_head",
    ),
    "mpt": Species("MptForCausalLM", "Wqkv down_proj out_proj up_proj", "wte", config={"max_seq_len": 64}),
    "biogpt": Species(
        "BioGptForCausalLM", "fc1 fc2 k_proj out_proj q_proj v_proj", "embed_positions embed_tokens"
    ),
    "xglm": Species(
        "XGLMForCausalLM",
        "fc1 fc2 k_proj out_proj q_proj v_proj",
        "embed_tokens",
        config={"attention_heads": 2},
    ),
    "mamba2": Species(
        "Mamba2ForCausalLM",
        "in_proj out_proj",
        "embeddings lm_head",
        config={"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "recurrentgemma": Species(
        "RecurrentGemmaForCausalLM",
        "down_proj gate_proj k_proj linear_out linear_x linear_y o_proj q_proj up_proj v_proj",
        "embed_tokens",
        config={"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
    ),
    "pegasus": Species(
        "PegasusForConditionalGeneration",
        "fc1 fc2 k_proj out_proj q_proj v_proj",
        "embed_positions shared",
        called="both",
    ),
    "mbart": Species(
        "MBartForConditionalGeneration",
        "fc1 fc2 k_proj out_proj q_proj v_proj",
        "embed_positions shared",
        called="both",
    ),
    "blenderbot": Species(
        "BlenderbotForConditionalGeneration",
        "fc1 fc2 k_proj out_proj q_proj v_proj",
        "embed_positions shared",
        called="both",
    ),
    "led": Species(
        "LEDForConditionalGeneration",
        "fc1 fc2 k_proj key key_global out_proj output q_proj query query_global v_proj value value_global",
        "embed_positions shared",
        called="both",
        config={
            "attention_window": 4,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
    ),
    "umt5": Species(
        "UMT5ForConditionalGeneration",
        "k o q v wi_0 wi_1 wo",
        "relative_attention_bias shared",
        called="both",
    ),
    "longt5": Species(
        "LongT5ForConditionalGeneration", "k o q v wi wo", "relative_attention_bias shared", called="both"
    ),
    "prophetnet": Species(
        "ProphetNetForConditionalGeneration",
        "intermediate key_proj out_proj output query_proj relative_pos_embeddings value_proj",
        "ngram_embeddings position_embeddings word_embeddings",
        called="both",
        config={
            "ngram": 2,
            "num_encoder_layers": 2,
            "num_encoder_attention_heads": 2,
            "num_decoder_attention_heads": 2,
            "num_buckets": 8,
            "relative_max_distance": 16,
        },
    ),
    "fsmt": Species(
        "FSMTForConditionalGeneration",
        "fc1 fc2 k_proj out_proj q_proj v_proj",
        "embed_positions embed_tokens output_projection",
        called="both",
        config={"src_vocab_size": 96, "tgt_vocab_size": 96},
    ),
    "mobilebert": Species(
        "MobileBertForMaskedLM",
        "dense embedding_transformation key query value",
        "dense position_embeddings token_type_embeddings word_embeddings",
        config={"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16},
    ),
    "funnel": Species(
        "FunnelForMaskedLM",
        "k_head linear_1 linear_2 post_proj q_head v_head",
        "word_embeddings",
        config={"block_sizes": [1, 1], "d_head": 16, "d_inner": 64},
    ),
    "mpnet": Species(
        "MPNetForMaskedLM", "dense k o q v", "position_embeddings relative_attention_bias word_embeddings"
    ),
    "xlnet": Species("XLNetLMHeadModel", "layer_1 layer_2", "word_embedding", config={"d_inner": 64}),
    "modernbert": Species("ModernBertForMaskedLM", "Wi Wo Wqkv dense", "tok_embeddings"),
    "squeezebert": Species(
        "SqueezeBertForMaskedLM",
        "conv1d dense key query value",
        "position_embeddings token_type_embeddings word_embeddings",
        config={"embedding_size": 32},
    ),
    "yoso": Species(
        "YosoForMaskedLM",
        "dense key query value",
        "position_embeddings token_type_embeddings word_embeddings",
    ),
    "camembert": Species(
        "CamembertForMaskedLM",
        "dense key query value",
        "position_embeddings token_type_embeddings word_embeddings",
    ),
    "beit": Species(
        "BeitForImageClassification",
        "dense key query value",
        "classifier projection",
        called="images",
        config={"num_labels": 16},
    ),
    "deit": Species(
        "DeiTForImageClassification",
        "dense key query value",
        "classifier projection",
        called="images",
        config={"num_labels": 16},
    ),
    "segformer": Species(
        "SegformerForImageClassification",
        "dense dense1 dense2 key query sr value",
        "classifier proj",
        called="images",
        config={
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "num_attention_heads": [1, 2],
            "sr_ratios": [2, 1],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "mlp_ratios": [2, 2],
            "num_labels": 16,
        },
    ),
    "siglip": Species(
        "SiglipVisionModel",
        "fc1 fc2 k_proj out_proj q_proj v_proj",
        "patch_embedding position_embedding",
        called="images",
    ),
    "regnet": Species(
        "RegNetForImageClassification",
        "convolution",
        "classifier",
        called="images",
        config={
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "groups_width": 8,
            "num_labels": 16,
        },
    ),
    "hubert": Species(
        "HubertForCTC",
        "conv intermediate_dense k_proj out_proj output_dense projection q_proj v_proj",
        "lm_head",
        called="audio",
        config={
            "conv_dim": (16, 16),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    "swinv2": Species(
        "Swinv2ForImageClassification",
        "dense key query reduction value",
        "classifier projection",
        called="images",
        config={
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "num_layers": 2,
            "window_size": 2,
            "patch_size": 2,
            "num_labels": 16,
        },
    ),
}
