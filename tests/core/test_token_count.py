"""The tokens behind a gradient, for losses that are means over tokens."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import SIRFShampoo, StructPrecondError, get_token_count

TOKENS = torch.arange(12).view(3, 4)
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
LABELS = torch.tensor([[-100, 5, -100, -100], [-100, 1, 2, 3], [-100, -100, -100, -100]])


class Model(nn.Module):
    """Embeds tokens, whatever else it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 2)

    def forward(self, tokens: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        embedded: Tensor = self.words(TOKENS)
        return embedded


INPUTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], int]] = {
    "tokens": ((TOKENS,), {}, 12),
    "one long sequence": ((TOKENS.flatten(),), {}, 12),
    "several channels": ((TOKENS.view(3, 2, 2),), {}, 6),
    "floats and flags first": ((torch.ones(7, 7), TOKENS > 1, torch.tensor(3), TOKENS), {}, 12),
    "mask": ((TOKENS,), {"attention_mask": MASK}, 7),
    "mask of flags": ((TOKENS,), {"attention_mask": MASK > 0}, 7),
    "mask of scores": ((TOKENS,), {"attention_mask": torch.zeros(3, 4)}, 12),
    "mask of pairs": ((TOKENS,), {"attention_mask": MASK[:, None, None, :]}, 12),
    "no mask": ((TOKENS,), {"attention_mask": None, "labels": None}, 12),
    "labels": ((TOKENS,), {"attention_mask": MASK, "labels": LABELS}, 4),
    "labels of classes": ((TOKENS,), {"labels": torch.tensor([0, 2, -100])}, 2),
    "labels that are scores": ((TOKENS,), {"labels": torch.ones(3, 4)}, 12),
    "by keyword": ((), {"input_ids": TOKENS, "attention_mask": MASK}, 7),
    "in a dict": (({"input_ids": TOKENS, "attention_mask": MASK, "labels": LABELS},), {}, 4),
    "in another mapping": ((UserDict(input_ids=TOKENS, attention_mask=MASK),), {}, 7),
}


@pytest.mark.parametrize(("args", "kwargs", "expected"), INPUTS.values(), ids=INPUTS)
def test_tokens_are_counted(args: tuple[Any, ...], kwargs: dict[str, Any], expected: int) -> None:
    model = Model()
    optimizer = SIRFShampoo(model, batch_size=get_token_count)
    for passes in (1, 2):
        optimizer.zero_grad()
        for _ in range(passes):
            model(*args, **kwargs).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == passes * expected
    direct = get_token_count((*args, *kwargs.values()), kwargs)
    assert direct == expected
    assert type(direct) is int


def test_without_integers_it_says_what_to_do() -> None:
    with pytest.raises(StructPrecondError, match=r"tensor of integers.*'Tensor'.*batch_size="):
        get_token_count((torch.ones(3, 4),))


def test_own_callable_gets_keywords_if_it_takes_them() -> None:
    seen: list[Any] = []

    def measure(inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> int:
        seen.append((inputs, keywords))
        return 6

    model = Model()
    optimizer = SIRFShampoo(model, batch_size=measure)
    model(TOKENS, scale=2).sum().backward()
    optimizer.step()
    assert optimizer.batch_size == 6
    (given,) = seen
    assert given[0] == (TOKENS, 2)
    assert given[1] == {"scale": 2}
    optimizer.batch_size = int  # a callable without a signature
    assert optimizer.batch_size == 0 or optimizer.batch_size is None
