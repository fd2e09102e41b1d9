"""Whether a model folder's files are the ones that were released: their SHA-256, listed in the folder.

The list has the form of the command `sha256sum`, which checks it as well. It tells damage and mixed-up files;
who can write the folder can write the list too, so against an attacker compare it with the repository's.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from aligner_integrations.errors import ModelLoadError

SUMS = "SHA256SUMS"
AS_LISTED = "as listed"


def write_sums(folder: Path) -> None:
    """Write the list for all files of `folder`."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    lines = [f"{_digest(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def check_sums(folder: Path) -> dict[str, str]:
    """Return for each file, listed or there: as listed, changed, missing or not listed.

    Raises:
        ModelLoadError: the folder has no list, or it cannot be read.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        there = {path.name for path in folder.iterdir()} - {SUMS}
        found = {}
        for name in sorted({*listed, *there}):
            if name not in listed or name not in there:
                found[name] = "not listed" if name in there else "missing"
            else:
                found[name] = AS_LISTED if _digest(folder / name) == listed[name] else "changed"
        return found
    except FileNotFoundError as error:
        raise ModelLoadError(f"{folder} has no {SUMS} to check its files by") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{folder / SUMS} cannot be read: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
