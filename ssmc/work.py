"""The folder of a compilation: for what does not fit into memory, and for how far it came."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmc.core.journal import Journal
from ssmc.core.ranks import find_ranks
from ssmc.core.store import Store, parse_size
from ssmc.errors import RankError, SsmcError, UsageError


@dataclass(frozen=True)
class Work:
    """Where a compilation keeps what does not fit into memory, and how far it came.

    `limit` is of memory, in bytes or as text ("6GB"); without it all stays there. Without a
    `folder`, the files are among the system's temporary ones, and no progress is kept.
    """

    folder: Path | None = None
    limit: int | str | None = None
    resume: bool = False

    def store(self) -> Store | None:
        """Where tensors are to be kept; UsageError for a limit that is no size."""
        if self.limit is None:
            return None
        limit = parse_size(self.limit) if isinstance(self.limit, str) else self.limit
        folder = (self.folder or Path(tempfile.gettempdir())).absolute()
        there = next(p for p in (folder, *folder.parents) if p.is_dir())  # its files have no names
        return Store(there, limit)

    @contextlib.contextmanager
    def journal(self, identity: Mapping[str, Any]) -> Iterator[Journal | None]:
        """The journal of the compilation that has this identity.

        It is removed at the end, and where an error says that trying again does not help; what
        else ends the compilation leaves it, to go on from.
        """
        if self.folder is None:
            if self.resume:
                raise UsageError("there is nothing to resume from without a folder for it")
            yield None
            return
        journal = Journal(self.folder, identity, resume=self.resume, ranks=find_ranks())
        keep = False
        try:
            yield journal
        except RankError as error:
            keep = journal.published
            if keep:
                error.hint = "run the same command with --resume: what is done is kept"
            raise
        except SsmcError:
            raise
        except BaseException:
            keep = journal.published
            raise
        finally:
            if not keep:
                journal.remove()
