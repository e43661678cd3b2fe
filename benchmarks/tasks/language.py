"""The character-level transformer of the examples."""

from __future__ import annotations

from typing import Self

from char_lm import CharTask, Corpus, Shape, load_corpus


class Language(CharTask):
    """A language model on the source text of Python's standard library."""

    steps = 400

    def __init__(self, shape: Shape | None = None, corpus: Corpus | None = None) -> None:
        super().__init__(shape or Shape(), corpus or load_corpus())
        # the loss is a mean over tokens
        self.samples = self.shape.batch * self.shape.context

    @classmethod
    def of_width(cls, width: int) -> Self:
        """Return a task of 200 steps with a model of another width, and heads of 32."""
        task = cls(Shape(width=width, heads=width // 32), load_corpus())
        task.steps = 200
        return task
