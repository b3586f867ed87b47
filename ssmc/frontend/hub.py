"""Models by their Hugging Face id: downloaded once, then read from the cache."""

from __future__ import annotations

import re
from pathlib import Path

from ssmc.core.disk import read_json
from ssmc.errors import UsageError
from ssmc.frontend import state_spaces
from ssmc.frontend.weights import first_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.jinja")
_LOCAL = "or give a local folder, or 'demo'"


def is_id(target: str) -> bool:
    """Whether `target` has the form owner/name."""
    return _ID.fullmatch(target) is not None


def download(repo: str, revision: str | None = None) -> Path:
    """The folder of a model's files, downloaded unless the cache has them.

    Pickled weights are left out, except for state-spaces checkpoints, which have no others.
    Raises UsageError for an unknown id or revision, and without a connection.
    """
    folder = _snapshot(repo, revision, list(_FILES))
    config = folder / "config.json"
    if config.is_file() and state_spaces.describes(read_json(config)):
        folder = _snapshot(repo, revision, [*_FILES, state_spaces.WEIGHTS])
    return folder


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f" at revision '{revision}'" if revision else ""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise UsageError(
            f"the Hugging Face model '{repo}' needs an agreement to its terms",
            hint=f"accept them on its page and log in with 'hf auth login', {_LOCAL}",
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise UsageError(
            f"there is no folder and no Hugging Face model '{repo}'{at}",
            hint=f"check the spelling and, for a private model, 'hf auth login'; {_LOCAL}",
        ) from None
    except Exception as error:  # of whichever HTTP client the library uses, too
        raise UsageError(
            f"'{repo}' is no local folder, and could not be downloaded{at}: {first_line(error)}",
            hint=f"check the connection and HF_HUB_OFFLINE, {_LOCAL}",
        ) from error
