"""Groups embeddings as vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from structprecond.groups.base import FlattenAndConcatenate


@dataclass(frozen=True)
class FlattenEmbedding(FlattenAndConcatenate):
    """Group the weight of an embedding as one vector.

    The vector has `num_embeddings * embedding_dim` entries, so choose a cheap structure:
    `diagonal`, `block<k>diagonal`, `hierarchical<k1>_<k2>` or `triltoeplitz`.

    Attributes:
        EMBEDDING_CLS: The classes that count as embeddings.

    Example:
        >>> FlattenEmbedding().group([torch.zeros(10, 4)]).shape
        torch.Size([40])
    """

    EMBEDDING_CLS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return the weight of every embedding."""
        layers = (m for m in model.modules() if isinstance(m, self.EMBEDDING_CLS))
        return [[m.weight] for m in layers]  # type: ignore[list-item]
