"""The errors that this library raises on purpose."""


class StructPrecondError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do."""


class StructureError(StructPrecondError):
    """A structure that does not exist, does not fit a tensor, or cannot do what is asked."""


class GroupError(StructPrecondError):
    """A grouping rule that cannot be applied to the parameters it was given."""


class HyperparameterError(StructPrecondError):
    """An unknown hyperparameter, or a value outside its range."""


class GradientError(StructPrecondError):
    """A gradient that cannot be used: sparse, complex, or non-finite where that is an error."""


class CheckpointError(StructPrecondError):
    """A checkpoint that does not belong to this optimizer; nothing was loaded."""


class DecompositionError(StructPrecondError):
    """A matrix decomposition that failed in float64 too.

    Attributes:
        rows: The indices of what failed, along the first dimension of the stack.
    """

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows
