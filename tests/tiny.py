"""A decoder of a few thousand parameters, of each family."""

from stepwiser_jax.model.config import Llama3RopeScaling, ModelConfig


def tiny_config(family: str = "llama", **changes) -> ModelConfig:
    """Sizes that differ wherever they can; head_dim differs from width / heads on purpose."""
    fields = {
        "model_type": family,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16 if family == "qwen3" else 8,
        "max_length": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": Llama3RopeScaling(8.0, 1.0, 4.0, 32) if family == "llama" else None,
        "tie_embeddings": family != "llama",
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "initializer_range": 0.3,
    }
    return ModelConfig(**{**fields, **changes})
