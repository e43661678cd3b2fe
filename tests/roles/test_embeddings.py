"""Embeddings that are not an `nn.Embedding`."""

from __future__ import annotations

import pytest
from torch import nn

from tests.roles.helpers import HEAD, LINEAR, NORM, Bag, at, check, param


@pytest.mark.parametrize("name", ["latents", "latent", "learned_latents", "query_tokens"])
@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4), (2, 5, 4)])
def test_learned_latents(name: str, shape: tuple[int, ...]):
    """As in Perceiver."""
    check(Bag(**{name: param(*shape)}, fc=nn.Linear(4, 2)), {name: "embedding"} | at("", fc=HEAD))


def test_low_rank_embedding():
    """As in peft: LoRA's two factors for an embedding, and DoRA's magnitudes."""
    table = Bag(
        base_layer=nn.Embedding(9, 4),
        lora_embedding_A=nn.ParameterDict({"default": param(2, 9)}),
        lora_embedding_B=nn.ParameterDict({"default": param(4, 2)}),
        lora_magnitude_vector=nn.ModuleDict({"default": Bag(weight=param(1, 4))}),
    )
    check(Bag(words=table), {
        "words.base_layer.weight": "embedding",
        "words.lora_embedding_A.default": "embedding",
        "words.lora_embedding_B.default": "embedding",
        "words.lora_magnitude_vector.default.weight": "other",
    })  # fmt: skip


def test_low_rank_linear_layer():
    factors = {name: nn.ModuleDict({"default": nn.Linear(4, 4, bias=False)})
               for name in ("lora_A", "lora_B")}  # fmt: skip
    blocks = nn.ModuleList([Bag(fc=Bag(base_layer=nn.Linear(4, 4), **factors))])
    expected = at("blocks.0.fc", base_layer=LINEAR, lora_A__default={"weight": "matrix"},
                  lora_B__default={"weight": "matrix"})  # fmt: skip
    check(Bag(blocks=blocks), expected)


def test_biases_and_norms_of_attention_and_convolutions():
    """As in Conformer and ConvNeXt V2."""

    class GRN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = param(1, 1, 1, 4), param(1, 1, 1, 4)

    model = Bag(pos_bias_u=param(2, 4), pos_bias_v=param(2, 4), grn=GRN(), fc=nn.Linear(4, 2))
    check(model, {"pos_bias_u": "bias", "pos_bias_v": "bias"} | at("", grn=NORM, fc=HEAD))
