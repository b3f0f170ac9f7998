"""What the engine raises at its callers. Free of torch, so that it can be named before torch is."""


class EngineFullError(Exception):
    """No place is left in the queue."""


class EngineStoppedError(Exception):
    """The engine runs no more; the message is for the operator."""


class GenerationError(Exception):
    """The model failed on this generation; the message holds no text of it."""
