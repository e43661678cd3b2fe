"""Patterns of the names of parameters, modules and classes."""

from __future__ import annotations

import re
from functools import lru_cache

from torch import nn

# The names under which wrappers hold a module.
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
# Heads besides the last layer, which may have no such name.
AUXILIARY = re.compile(r"aux(iliary)?(_?(logits|heads?|classifiers?))?(_?\d+)?")
# `value` is no head next to a key, nor is `conv_out` inside an encoder.
VALUE = re.compile(r"values?(_\w+)?(_?\d+)?")
KEY = re.compile(r"k(eys?)?(_\w+|\d+)?")
CONV_OUT = re.compile(r"(outc(onv)?|out_conv|conv_out)(_?\d+)?")
ENCODER = re.compile(r"(?!auto)(\w+_)?encoder")
# Classes whose instances are heads, whatever their names.
HEAD_CLASS = re.compile(
    r"\w*(lm|mlm|classif\w*|predict\w*|segment\w*|decode|output|regress\w*|detect\w*)head|outconv"
)
EMBEDDING = re.compile(
    r"(\w+_)?(embs?|embeds?|embeddings?|embed_positions|tokens?|tok|w[tp]e|pe|bias_table"
    r"|rel_pos(_[hw])?|pos(ition(al)?)?_enc(odings?)?|latents?|lora_embedding_[ab])(_?\d+)?"
)
NORM = re.compile(r"\w*norm\w*|(\w+_)?(ln|bn|gn|grn)(_?[\df])?")
BIAS = re.compile(r"bias(es)?(_\w+)?|\w+_bias(es)?(_[uv])?")
SHORT_BIAS = re.compile(r"b\d*|\w*bias\w*")  # where biases are expected
QKV = re.compile(r"\w*qkv\w*|c_attn|w_pack|query_key_value")
EXPERTS = re.compile(r"\w*(expert|moe)\w*")
ROUTER = re.compile(r"(\w+_)?routers?(_weights?)?|shared_experts?_gate")
# Routers if they are next to experts.
GATE = re.compile(r"(\w+_)?(gates?|gating)(_(weights?|proj|network|logits))?|w_?g|switch")
DEPTHWISE = re.compile(r"\w*(depthwise|dw_?conv|conv_?dw)\w*")
ATTENTION = re.compile(r"\w*(attn|attention)\d*")
LOGARITHM = re.compile(r"log_\w+|\w+_logs?")  # of time scales in state space models, mostly
# Modules with all layers of a model in one, unless a number follows.
STACK = re.compile(r"h|(\w+_)?(layers|blocks|stack)|\w*(stacked|scan)\w*")
# Names of layers that say less than the name of the module around them.
INNER = re.compile(r"linear|fc|base_layer|original_module")
# Names of parameters that say less than the name of their module.
ANY = re.compile(r"w|weights?|bias|kernel|scale|gamma|beta|\d+")
# Layers that may come last but are no outputs: inputs, side branches, projections (except output
# projections, which may be the head).
ASIDE = re.compile(
    r"\w*(pool|embed|expert|modulation|adaln)\w*|(\w+_)?(emb|gate|router|in|input|stem)"
    r"|(in|input|stem|time|cond)_\w+|\w+(?<!out)(?<!output)(?<!final)_proj(ection)?"
)
# Classes of parts of models. An MLP may be a whole model.
PART_CLASS = re.compile(
    r"\w*(block|layer|experts?|moe|bottleneck|stage|stem|glu|residual|encoder|backbone|trunk"
    r"|embeddings?|pooler)(v?\d+d?)?"
)
MLP_CLASS = re.compile(r"\w*(mlp|ffn|feedforward|feed_forward)")


@lru_cache(maxsize=4096)
def says(pattern: re.Pattern[str], *names: str) -> bool:
    """Return whether a pattern matches one of the names in full, in lower case."""
    return any(pattern.fullmatch(name.lower()) for name in names)


def kind(module: nn.Module) -> str:
    """Return the name of a module's class, without the prefix of parametrized classes."""
    return type(module).__name__.removeprefix("Parametrized")
