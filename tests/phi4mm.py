"""What `config.json` says in Microsoft's layout of Phi-4-multimodal.

Source: the published file, as TensorRT-LLM quotes it in `test_modeling_phi4mm.py`; `audio_token_id`
is not in it, so that models of a small vocabulary can be written in this layout as well.
"""

from typing import Any


def remote_parts(speech: dict[str, Any]) -> dict[str, Any]:
    """The parts of Microsoft's `config.json` that transformers has in other words."""
    # fmt: off
    return {
        "img_processor": None,
        "embd_layer": {
            "embedding_cls": "image_audio",
            "audio_embd_layer": {
                "compression_rate": 8, "downsample_rate": 1, "embedding_cls": "audio",
                "enable_gradient_checkpointing": True, "projection_cls": "mlp",
                "use_conv_downsample": False, "use_qformer": False,
            },
            "image_embd_layer": {
                "crop_size": 448, "embedding_cls": "tune_image",
                "enable_gradient_checkpointing": True, "hd_transform_order": "sub_glb",
                "image_token_compression_cls": "avg_pool_2d", "projection_cls": "mlp",
                "use_hd_transform": True, "with_learnable_separator": True,
            },
        },
        "audio_processor": {
            "name": "cascades",
            "config": {
                "activation": "swish",
                "activation_checkpointing": {"interval": 1, "module": "transformer"},
                "attention_dim": speech["hidden_size"],
                "attention_heads": speech["num_attention_heads"],
                "audio_token_id": speech["audio_token_id"],
                "batch_norm": False, "bias_in_glu": True, "causal": True, "chunk_size": -1,
                "cnn_layer_norm": True, "conv_activation": "swish", "conv_glu_type": "swish",
                "depthwise_multiplier": 1,
                "depthwise_seperable_out_channel": speech["hidden_size"],
                "dropout_rate": 0.0, "encoder_embedding_config": {"input_size": 80},
                "ext_pw_kernel_size": 1, "ext_pw_out_channel": speech["hidden_size"],
                "input_layer": "nemo_conv", "input_size": 80, "kernel_size": 3, "left_chunk": 18,
                "linear_units": speech["intermediate_size"],
                "nemo_conv_settings": {"conv_channels": speech["nemo_conv_channels"]},
                "num_blocks": speech["num_blocks"],
                "relative_attention_bias_args": {
                    "t5_bias_max_distance": speech["bias_max_distance"], "type": "t5",
                },
                "time_reduction": 8,
            },
        },
    }
    # fmt: on


def published() -> dict[str, Any]:
    """The published `config.json`, its long LongRoPE factors replaced."""
    speech = {
        "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 1536,
        "nemo_conv_channels": 1024, "num_blocks": 24, "bias_max_distance": 500,
        "audio_token_id": 200011,
    }  # fmt: skip
    return {
        "architectures": ["Phi4MMForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 199999,
        "embd_pdrop": 0.0,
        "eos_token_id": 199999,
        "full_attn_mod": 1,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "phi4mm",
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 199999,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "speech_lora": {"dp": 0.01, "layer": "...", "lora_alpha": 640, "r": 320},
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.1",
        "use_cache": True,
        "vision_lora": {"dp": 0.0, "layer": "...", "lora_alpha": 512, "r": 256},
        "vocab_size": 200064,
        **remote_parts(speech),
    }  # fmt: skip
