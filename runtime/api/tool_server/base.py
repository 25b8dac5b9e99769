"""What every built-in tool has in common."""

from __future__ import annotations


class ToolError(Exception):
    """A call of a tool failed. The message is for the model, which may try something else."""
