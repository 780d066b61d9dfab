"""The shape of a model, read from and written to a Hugging Face config.json.

Families: qwen2 (and 2.5), qwen3, and llama (llama 2 to 3.2, SmolLM2). Fields that are not
implemented are refused by name: a model that ignored them would be silently wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stepwiser_jax.errors import UserError

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
"""Language models; classifiers end in ForTokenClassification in place of ForCausalLM."""

# Fields of config.json that change the computation, and the values that mean "not used".
_MUST_BE_UNUSED: dict[str, tuple[Any, ...]] = {
    "use_sliding_window": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "num_experts_per_tok": (0, None),
    "n_routed_experts": (0, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "logits_scaling": (None,),
    "residual_multiplier": (None,),
    "embedding_multiplier": (None,),
}


@dataclass(frozen=True)
class Llama3RopeScaling:
    """How Llama 3.1 stretches low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scale(self, frequency: float) -> float:
        """Returns a frequency, in radians per position, stretched if its wave is long."""
        wavelength = 2 * math.pi / frequency
        low = self.original_max_position_embeddings / self.low_freq_factor
        high = self.original_max_position_embeddings / self.high_freq_factor
        if wavelength < high:
            return frequency
        if wavelength > low:
            return frequency / self.factor
        smooth = self.original_max_position_embeddings / wavelength - self.low_freq_factor
        smooth /= self.high_freq_factor - self.low_freq_factor
        return (1 - smooth) * frequency / self.factor + smooth * frequency


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a model; hashable, so that it can be static under jit.

    Attributes:
        classifier: whether the model scores two classes, 0 for wrong and 1 for right, in place of a
            vocabulary.
        unknown_ids: ids below `vocab_size` without a token, since many models round the number of
            logits up. Their probability is 0. They follow from the tokenizer that a model is loaded
            with, and are not written to config.json.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    classifier: bool = False
    unknown_ids: tuple[range, ...] = ()

    @classmethod
    def from_hf(cls, fields: dict[str, Any]) -> ModelConfig:
        """Reads a config.json. Raises UserError that names a missing or unsupported field."""
        model_type = fields.get("model_type")
        if str(model_type).startswith("gemma"):
            raise UserError(
                f"config.json: Gemma's models ({model_type}) are not implemented, only their "
                f"vocabulary is read; expected model_type among {sorted(ARCHITECTURES)}"
            )
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise UserError(
                f"config.json: expected model_type among {sorted(ARCHITECTURES)}, found "
                f"{model_type!r}"
            )
        _refuse_unsupported(fields)
        classifier = "TokenClassification" in str(fields.get("architectures"))
        classes = len(_typed(fields, "id2label", dict) or "01")  # transformers leaves two out
        if classifier and classes != 2:
            raise UserError(f"config.json: expected 2 classes in id2label, found {classes}")
        theta, scaling = _rope(fields)
        heads, width = _size(fields, "num_attention_heads"), _size(fields, "hidden_size")
        kv_heads = _size(fields, "num_key_value_heads", heads)
        head_dim = _size(fields, "head_dim", width // heads or None)
        if heads % kv_heads or head_dim % 2:
            raise UserError(
                f"config.json: expected an even head_dim and num_key_value_heads to divide "
                f"num_attention_heads, found {head_dim}, {kv_heads} and {heads}"
            )
        eos = _typed(fields, "eos_token_id", int, list)
        return cls(
            model_type=model_type,
            vocab_size=_size(fields, "vocab_size"),
            hidden_size=width,
            intermediate_size=_size(fields, "intermediate_size"),
            num_layers=_size(fields, "num_hidden_layers", most=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_length=_size(fields, "max_position_embeddings"),
            rms_norm_eps=_positive(fields, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=_typed(fields, "tie_word_embeddings", bool) or False,
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            initializer_range=_positive(fields, "initializer_range", 0.02),
            bos_token_id=_typed(fields, "bos_token_id", int),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=_typed(fields, "pad_token_id", int),
            classifier=classifier,
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns a config.json that transformers 4 and 5 read alike."""
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope = {"rope_type": "llama3", **vars(self.rope_scaling)}
        eos, architecture = self.eos_token_id, ARCHITECTURES[self.model_type]
        if self.classifier:
            architecture = architecture.replace("CausalLM", "TokenClassification")
        return {
            "architectures": [architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_length,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope if self.rope_scaling is not None else None,
            "rope_parameters": rope | {"rope_theta": self.rope_theta},
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "pad_token_id": self.pad_token_id,
        }


MAX_LAYERS = 1000
"""Several times as many as any model has; a larger number is a mistake."""


def _size(
    fields: dict[str, Any], name: str, default: int | None = None, most: int = 2**31 - 1
) -> int:
    value = fields.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(
            f"config.json: expected an integer {name!r} from 1 to {most}, found {value!r}"
        )
    return value


def _positive(fields: dict[str, Any], name: str, default: Any = None) -> float:
    value = fields.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f"config.json: expected a positive number {name!r}, found {value!r}")
    return float(value)


def _typed(fields: dict[str, Any], name: str, *types: type) -> Any:
    """Returns a field, or None if it is not set."""
    value = fields.get(name)
    if value is not None and type(value) not in types:
        expected = " or ".join(kind.__name__ for kind in types)
        raise UserError(f"config.json: expected {name!r} to be {expected}, found {value!r:.80}")
    return value


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    for name, unused in _MUST_BE_UNUSED.items():
        if name in fields and fields[name] not in unused:
            raise UserError(f"config.json: {name} = {fields[name]!r} is not supported")
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"config.json: hidden_act = {activation!r} is not supported, only 'silu'")
    if fields.get("attention_bias"):
        raise UserError("config.json: attention_bias = true is not supported")
    layers = _typed(fields, "layer_types", list) or []
    other = sorted({str(kind) for kind in layers} - {"full_attention"})
    if other:
        raise UserError(f"config.json: layer_types {other} are not supported, only full_attention")


def _rope(fields: dict[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """Reads rope_parameters (transformers 5), or rope_theta and rope_scaling (transformers 4)."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope |= _typed(fields, name, dict) or {}
    theta = _positive(rope, "rope_theta", _positive(fields, "rope_theta", 10000.0))
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError("config.json: rope_parameters.partial_rotary_factor is not supported")
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        raise UserError(
            f"config.json: rope type {rope_type!r} is not supported, only 'default' and 'llama3'"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in rope]
    if missing:
        raise UserError(f"config.json: rope type 'llama3' needs {missing}")
    factor, low, high = (_positive(rope, name) for name in names[:3])
    if low >= high:
        raise UserError(
            f"config.json: expected low_freq_factor below high_freq_factor, found {low} and {high}"
        )
    return theta, Llama3RopeScaling(factor, low, high, _size(rope, names[3]))
