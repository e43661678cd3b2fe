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
