"""Run folders and checkpoints: their layout on disk is defined here only.

Imports all other packages except the command line, which uses it.
"""

from probdiff.storage.checkpoint import Checkpoint
from probdiff.storage.run import Run, create_run, open_run

__all__ = ["Checkpoint", "Run", "create_run", "open_run"]
