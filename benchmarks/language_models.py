"""The parameters of three language models, for plans: modules without a forward pass."""

from __future__ import annotations

from torch import nn


def gpt2() -> nn.Module:
    """Return the parameters of GPT-2 with 124 million parameters."""
    return _model(layers=12, width=768, inner=3072, keys=768, words=50257, tied=True, old=True)


def llama_1b() -> nn.Module:
    """Return the parameters of a model like Llama with 1.2 billion parameters."""
    return _model(layers=16, width=2048, inner=8192, keys=512, words=128256, tied=True)


def llama_7b() -> nn.Module:
    """Return the parameters of a model like Llama with 6.7 billion parameters."""
    return _model(layers=32, width=4096, inner=11008, keys=4096, words=32000)


def _model(
    layers: int,
    width: int,
    inner: int,
    keys: int,
    words: int,
    tied: bool = False,
    old: bool = False,
) -> nn.Module:
    """Return the parameters of a transformer.

    Args:
        layers: The number of layers.
        width: The width of the residual stream.
        inner: The width of the MLP.
        keys: The width of all keys, smaller than `width` if heads share them.
        words: The size of the vocabulary.
        tied: Whether the head is the embedding.
        old: Whether layers are those of GPT-2, with biases, fused queries, keys and values, learned
            positions, and an MLP without a gate.
    """
    norm = nn.LayerNorm if old else nn.RMSNorm

    def linear(n: int, m: int) -> nn.Linear:
        return nn.Linear(n, m, bias=old)

    def attention() -> nn.Module:
        out = {"out_proj": linear(width, width)}
        if old:
            return nn.ModuleDict({"qkv_proj": linear(width, width + 2 * keys), **out})
        sizes = {"q_proj": width, "k_proj": keys, "v_proj": keys}
        return nn.ModuleDict({name: linear(width, size) for name, size in sizes.items()} | out)

    def mlp() -> nn.Module:
        names = ("up_proj",) if old else ("gate_proj", "up_proj")
        parts = {name: linear(width, inner) for name in names}
        return nn.ModuleDict({**parts, "down_proj": linear(inner, width)})

    def layer() -> nn.Module:
        parts = {"attention": attention(), "mlp": mlp()}
        return nn.ModuleDict({"norm1": norm(width), "norm2": norm(width), **parts})

    model = nn.ModuleDict({"embedding": nn.Embedding(words, width)})
    if old:
        model["positions_embedding"] = nn.Embedding(1024, width)
    model["layers"] = nn.ModuleList(layer() for _ in range(layers))
    model["norm"] = norm(width)
    head = nn.Linear(width, words, bias=False)
    if tied:
        head.weight = model["embedding"].weight  # type: ignore[assignment]
    model["lm_head"] = head
    return model
