"""What the names of parameters, modules and classes say."""

from __future__ import annotations

import re
from functools import lru_cache

from torch import nn

# What is put around a module without changing what it is for.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_TARGET = r"(b?box|cls|class|mask|keypoint|kps|obj(ectness)?)"
HEAD = re.compile(
    # a `conv_head` is the last convolution before the pooling, as in EfficientNet
    r"((?!pre_|conv_head)(\w+_)?(heads?|classifiers?|logits?)|unembed(ding)?|embed_out|scores?"
    r"|head_dist|output_(projection|layer)|proj_out|qa_outputs|seq_relationship"
    rf"|(\w+_)?{_TARGET}_(predictors?|pred|reg|scores?|ctrness|centerness)|(class|bbox)_embed"
    # actors and critics, and the two streams of a dueling network
    r"|(actor|critic|advantage|value)s?(_(stream|branch|fc|out))?"
    r"|predict_\w+|outc(onv)?|out_conv|conv_out)(_?\d+)?"
)
# Heads beside the one at the end, which may have no name.
AUXILIARY = re.compile(r"aux(iliary)?(_?(logits|heads?|classifiers?))?(_?\d+)?")
# `value` means something else beside a key, and `conv_out` inside of an encoder.
VALUE = re.compile(r"values?(_\w+)?(_?\d+)?")
KEY = re.compile(r"k(eys?)?(_\w+|\d+)?")
CONV_OUT = re.compile(r"(outc(onv)?|out_conv|conv_out)(_?\d+)?")
ENCODER = re.compile(r"(?!auto)(\w+_)?encoder")
# Classes whose instances are heads, whatever they are called.
HEAD_CLASS = re.compile(
    r"\w*(lm|mlm|classif\w*|predict\w*|segment\w*|decode|output|regress\w*|detect\w*)head|outconv"
)
EMBEDDING = re.compile(
    r"(\w+_)?(embs?|embeds?|embeddings?|embed_positions|tokens?|tok|w[tp]e|pe|bias_table"
    r"|rel_pos(_[hw])?|pos(ition(al)?)?_enc(odings?)?|latents?|lora_embedding_[ab])(_?\d+)?"
)
NORM = re.compile(r"\w*norm\w*|(\w+_)?(ln|bn|gn|grn)(_?[\df])?")
BIAS = re.compile(r"bias(es)?(_\w+)?|\w+_bias(es)?(_[uv])?")
SHORT_BIAS = re.compile(r"b\d*|\w*bias\w*")  # where it is known that there are some
QKV = re.compile(r"\w*qkv\w*|c_attn|w_pack|query_key_value")
EXPERTS = re.compile(r"\w*(expert|moe)\w*")
ROUTER = re.compile(r"(\w+_)?routers?(_weights?)?|shared_experts?_gate")
# What may be a router too, if it stands beside experts.
GATE = re.compile(r"(\w+_)?(gates?|gating)(_(weights?|proj|network|logits))?|w_?g|switch")
DEPTHWISE = re.compile(r"\w*(depthwise|dw_?conv|conv_?dw)\w*")
ATTENTION = re.compile(r"\w*(attn|attention)\d*")
LOGARITHM = re.compile(r"log_\w+|\w+_logs?")  # of time scales in state space models, mostly
# Holds all the layers of a model in one, if it is not followed by a number.
STACK = re.compile(r"h|(\w+_)?(layers|blocks|stack)|\w*(stacked|scan)\w*")
# Layers whose name says nothing, but that of what they are in may.
INNER = re.compile(r"linear|fc|base_layer|original_module")
# Says nothing, but the name of its module may.
ANY = re.compile(r"w|weights?|bias|kernel|scale|gamma|beta|\d+")
# Layers that may come last though they lead into the model, to its side, or from one space to
# another. A projection that is said to lead out may well be the head.
ASIDE = re.compile(
    r"\w*(pool|embed|expert|modulation|adaln)\w*|(\w+_)?(emb|gate|router|in|input|stem)"
    r"|(in|input|stem|time|cond)_\w+|\w+(?<!out)(?<!output)(?<!final)_proj(ection)?"
)
# Classes of parts of models. What is called an MLP may be a whole model.
PART_CLASS = re.compile(
    r"\w*(block|layer|experts?|moe|bottleneck|stage|stem|glu|residual|encoder|backbone|trunk"
    r"|embeddings?|pooler)(v?\d+d?)?"
)
MLP_CLASS = re.compile(r"\w*(mlp|ffn|feedforward|feed_forward)")


@lru_cache(maxsize=4096)
def says(pattern: re.Pattern[str], *names: str) -> bool:
    """Return whether one of the names matches a pattern as a whole, in lower case."""
    return any(pattern.fullmatch(name.lower()) for name in names)


def kind(module: nn.Module) -> str:
    """Return the name of a module's class, before it was parametrized."""
    return type(module).__name__.removeprefix("Parametrized")
