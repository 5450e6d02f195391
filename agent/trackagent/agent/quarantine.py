"""Where damaged files go: out of the way of what comes, with the reason beside them, kept for people."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)


def set_aside(path: Path, quarantine: Path, name: str, reason: str) -> Path:
    """Moves `path` into the folder `quarantine` as `name` (numbered where that is taken), writes
    `<name without suffix>.reason`, and says so.

    Returns where it is now. OSError when it cannot be moved.
    """
    quarantine.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = quarantine / name
    number = 2
    while target.exists() or target.with_suffix(".reason").exists():
        target = (quarantine / name).with_stem(f"{Path(name).stem}-{number}")
        number += 1
    reason = " ".join(reason.split())
    shutil.move(path, target)
    target.with_suffix(".reason").write_text(f"{reason}\n")
    logger.error("%s is unreadable (%s): set aside as %s", path, reason, target)
    return target
