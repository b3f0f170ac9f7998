"""What a model is called. Imports nothing heavy: rows name the model before torch is there."""

import os
from pathlib import Path

DEFAULT_MODEL = "gpt2"


def folder_of(name: str) -> Path:
    """The folder that a name means, if it means one."""
    return Path(os.path.expanduser(name))  # Path.expanduser raises where there is no such user


def is_path(name: str) -> bool:
    """Whether it can be no hub id: those have one slash at most, between two names."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def called(name: str | None) -> str:
    """The hub id, or the folder's name: never the path, which is nobody's business."""
    if name is None:
        return DEFAULT_MODEL
    folder = folder_of(name)
    return folder.resolve().name if is_path(name) or folder.is_dir() else name
