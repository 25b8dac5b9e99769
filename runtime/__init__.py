"""Serving artifacts. Importing this loads neither a server nor an executor: `serve` does when it is called."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptoss_compile.artifact import Artifact


def serve(artifact: Artifact | str | os.PathLike[str], **options: Any) -> None:
    """Serve an artifact until SIGTERM or SIGINT; the options are those of `gptoss_compile.runtime.server.serve`."""
    from gptoss_compile.runtime import server

    server.serve(artifact, **options)
