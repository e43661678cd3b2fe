"""The errors of this library."""


class StructPrecondError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do."""


class StructureError(StructPrecondError):
    """A structure that is unknown, does not fit a tensor, or lacks an operation."""


class GroupError(StructPrecondError):
    """A grouping or a route that does not fit the parameters."""


class HyperparameterError(StructPrecondError):
    """An unknown hyperparameter, or a value outside its range."""


class GradientError(StructPrecondError):
    """An unusable gradient: sparse, complex, or non-finite with `nonfinite="raise"`."""


class CheckpointError(StructPrecondError):
    """A checkpoint that does not fit the optimizer; nothing was loaded."""


class DistributedError(StructPrecondError):
    """Ranks that cannot make a step together: one failed, stopped, or differs from the others."""


class LostRankError(DistributedError):
    """A rank that did not answer within the time limit of its process group, or has gone."""


class DecompositionError(StructPrecondError):
    """A matrix decomposition that failed in float32 and in float64.

    Attributes:
        rows: The indices of the failed matrices along the first dimension of the stack.
    """

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows
