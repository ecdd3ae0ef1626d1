"""Run folders and checkpoints: the only code that knows their layout on disk.

Imports everything but the command line, which stands on it.
"""

from probdiff.storage.checkpoint import Checkpoint
from probdiff.storage.run import Run, create_run, open_run

__all__ = ["Checkpoint", "Run", "create_run", "open_run"]
