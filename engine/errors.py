"""What can go wrong in the engine. Messages are safe to show an operator: no prompt, no output.

Exception
├── EngineFullError     no room in the queue; try again later
├── EngineStoppedError  the worker died or the engine was closed; no generation runs any more
└── GenerationError     this one generation failed; the others run on
"""


class EngineFullError(Exception):
    """No place is free in the queue."""


class EngineStoppedError(Exception):
    """The engine runs nothing any more."""


class GenerationError(Exception):
    """The model could not go on with this generation."""
