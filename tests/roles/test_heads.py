"""Output layers, with and without common names."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from tests.roles.helpers import (
    CONV,
    HEAD,
    LINEAR,
    NORM,
    Bag,
    at,
    check,
    mlp,
    param,
)


def test_mlps():
    check(nn.Linear(3, 2), HEAD)
    check(mlp(3, 4, 2), {"0.weight": "matrix", "0.bias": "bias", "2.weight": "head",
                         "2.bias": "bias"})  # fmt: skip
    check(mlp(4, 4, 4, 4), at("0", "2", **{"": LINEAR}) | at("4", **{"": HEAD}))
    listed = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    check(listed, at("0", "1", **{"": LINEAR}) | at("2", **{"": HEAD}))
    model = Bag(fc1=nn.Linear(3, 4), fc2=nn.Linear(4, 4), fc3=nn.Linear(4, 2))
    check(model, at("", fc1=LINEAR, fc2=LINEAR, fc3=HEAD))


def test_autoencoder():
    """An encoder and a decoder are similar, but not repeated blocks."""
    halves = at("", encoder__0=LINEAR, encoder__2=LINEAR, decoder__0=LINEAR, decoder__2=HEAD)
    check(Bag(encoder=mlp(6, 4, 2), decoder=mlp(2, 4, 6)), halves)
    down, up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3)
    filters = {"weight": "conv", "bias": "bias"}
    check(Bag(encoder=down, decoder=up), at("", encoder=filters, decoder=filters))


def test_backbone_and_head_in_a_sequential():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), nn.Flatten(), mlp(8, 4, 3))
    expected = {"0.0.weight": "conv", "0.0.bias": "bias"}
    check(model, expected | at("2", **{"0": LINEAR, "2": HEAD}))


def test_numbered_blocks_are_repeated():
    class Block(Bag):
        pass

    def block() -> Block:
        return Block(fc1=nn.Linear(4, 4), fc2=nn.Linear(4, 4))

    inside = at("block1", "block2", fc1=LINEAR, fc2=LINEAR)
    check(Bag(block1=block(), block2=block()), inside)
    first = Bag(out=nn.Linear(4, 2), block1=block(), block2=block())
    check(first, inside | at("", out=HEAD))  # registered first, and last in the forward pass
    stages = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
    check(stages, at("0.0", "1.0", **{"": LINEAR}))
    expected = at("0.0", "1.0", **{"": LINEAR}) | at("2", **{"": HEAD})
    check(nn.Sequential(*stages, nn.Linear(4, 4)), expected)


def test_layers_of_an_mlp_are_no_blocks():
    layers = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 2))]
    check(nn.ModuleList(layers), at("0.0", **{"": LINEAR}) | at("1.0", **{"": HEAD}))
    normed = [parametrizations.spectral_norm(nn.Linear(4, 4)) for _ in range(2)]
    check(nn.ModuleList(normed), {
        "0.bias": "bias", "0.parametrizations.weight.original": "matrix",
        "1.bias": "bias", "1.parametrizations.weight.original": "head",
    })  # fmt: skip


def test_blocks_count_only_if_they_hold_parameters():
    class Shortcut(Bag):
        pass

    model = nn.Sequential(Shortcut(fn=nn.ReLU()), Shortcut(fn=nn.Linear(3, 2)))
    check(model, at("1", fn=HEAD))


@pytest.mark.parametrize(
    "name",
    ["lm_head", "head", "classifier", "output_projection", "to_logits", "unembed", "score",
     "embed_out", "mlm_head", "proj_out", "head_dist", "qa_outputs", "head2", "cls_classifier"],
)  # fmt: skip
def test_named_heads(name: str):
    last = {"last": nn.Linear(4, 4)}
    check(Bag(**{name: nn.Linear(4, 2)}, **last), at("", **{name: HEAD}, last=LINEAR))
    # The last layer of a head is the head.
    check(Bag(**{name: mlp(4, 4, 2)}, **last),
          at("", **{f"{name}__0": LINEAR, f"{name}__2": HEAD}, last=LINEAR))  # fmt: skip


def test_transform_named_head():
    """As in ModernBERT: `head` ends in a norm, and the output layer follows it."""

    def model() -> Any:
        head = Bag(dense=nn.Linear(8, 8), norm=nn.LayerNorm(8))
        return Bag(words=nn.Embedding(11, 8), head=head, decoder=nn.Linear(8, 11))

    transform = at("head", dense=LINEAR, norm=NORM)
    check(model(), {"words.weight": "embedding"} | transform | at("", decoder=HEAD))
    tied = model()
    tied.decoder.weight = tied.words.weight
    check(tied, {"words.weight": "head", "decoder.bias": "bias"} | transform)


def test_what_comes_before_a_head_is_none():
    """As in DistilBERT."""
    model = Bag(pre_classifier=nn.Linear(4, 4), classifier=nn.Linear(4, 2))
    check(model, at("", pre_classifier=LINEAR, classifier=HEAD))


def test_several_heads():
    both = Bag(policy_head=mlp(4, 4, 3), value_head=mlp(4, 4, 1))
    expected = at("policy_head", "value_head", **{"0": LINEAR, "2": HEAD})
    check(both, expected)
    for heads in (nn.ModuleList([mlp(4, 4, 2), mlp(4, 4, 3)]),
                  nn.ModuleDict({"0": mlp(4, 4, 2), "1": mlp(4, 4, 3)})):  # fmt: skip
        check(Bag(heads=heads), at("heads.0", "heads.1", **{"0": LINEAR, "2": HEAD}))
    plain = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])
    check(Bag(heads=plain), at("heads.0", "heads.1", **{"": HEAD}))


def test_names_of_heads_in_blocks_say_nothing():
    class Attention(nn.Module):
        """As in a well-known tutorial: a list of heads that are not output heads."""

        def __init__(self) -> None:
            super().__init__()
            heads = [Bag(key=nn.Linear(4, 2), query=nn.Linear(4, 2)) for _ in range(2)]
            self.heads, self.proj = nn.ModuleList(heads), nn.Linear(4, 4)

    inside = at("heads.0", "heads.1", key=LINEAR, query=LINEAR) | at("", proj=LINEAR)
    blocks = nn.Sequential(Bag(sa=Attention()), Bag(sa=Attention()))
    check(Bag(blocks=blocks, out=nn.Linear(4, 9)),
          at("blocks.0.sa", "blocks.1.sa", **{"": inside}) | at("", out=HEAD))  # fmt: skip
    single = Bag(blocks=nn.Sequential(Bag(sa=Attention())), out=nn.Linear(4, 9))
    check(single, at("blocks.0.sa", **{"": inside}) | at("", out=HEAD))
    scores = [Bag(score=nn.Linear(4, 4), fc=nn.Linear(4, 4)) for _ in range(2)]
    inside = at("blocks.0", "blocks.1", score=LINEAR, fc=LINEAR)
    check(Bag(blocks=nn.ModuleList(scores), out=nn.Linear(4, 9)), inside | at("", out=HEAD))
    bare = [Bag(score=param(4, 3), fc=nn.Linear(3, 4)) for _ in range(2)]
    inside = at("blocks.0", "blocks.1", fc=LINEAR, **{"": {"score": "matrix"}})
    check(Bag(blocks=nn.ModuleList(bare), out=nn.Linear(4, 9)), inside | at("", out=HEAD))


def test_attention_has_no_head():
    attention = Bag(key=nn.Linear(4, 4), out_proj=nn.Linear(4, 4))
    model = Bag(words=nn.Embedding(9, 4), attn=attention)
    check(model, {"words.weight": "embedding"} | at("attn", key=LINEAR, out_proj=LINEAR))


@pytest.mark.parametrize(
    "name", ["pooler", "visual_projection", "time_mlp", "patch_embed", "input_layer", "fc_in"]
)
def test_what_leads_elsewhere_is_no_head(name: str):
    aside = Bag(dense=nn.Linear(4, 4))
    check(Bag(body=nn.Conv2d(3, 4, 3, bias=False), **{name: aside}),
          at("", body=CONV, **{f"{name}__dense": LINEAR}))  # fmt: skip
    check(Bag(out_proj=nn.Linear(4, 4), **{name: aside}),
          at("", out_proj=HEAD, **{f"{name}__dense": LINEAR}))  # fmt: skip


def test_weight_shared_by_linears_is_a_head_if_one_is():
    first, last = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    last.weight = first.weight
    model = Bag(first=first, middle=nn.Linear(4, 4), head=last)
    check(model, at("", first=HEAD, middle=LINEAR))


def test_module_used_twice_counts_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 2))
    check(model, at("0", **{"": LINEAR}) | at("4", **{"": HEAD}))


def test_parameter_with_two_names():
    weight = param(4, 3)
    check(Bag(w=weight, lm_head=weight), {"w": "head"})


def test_cycles():
    """A module may hold its parent, as `named_modules` allows."""
    child = Bag(fc=nn.Linear(4, 2))
    model = Bag(child=child)
    child.parent = model
    check(model, at("child", fc=HEAD))
