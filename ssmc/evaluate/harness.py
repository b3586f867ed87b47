"""A model of ours as lm-eval sees one: it scores continuations and goes on from prompts.

Importing this module needs lm-eval (the extra `eval`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ssmc.core.ranks import Ranks
from ssmc.core.saved import Saved
from ssmc.errors import RankError, UsageError
from ssmc.runtime.generate import Model, stream
from ssmc.runtime.sampling import Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from tokenizers import Tokenizer

LONGEST = 2048
"""Tokens of a window: a state-space model has no limit, and this is what published figures have."""

TOKENS = 8192
"""Tokens of a call, padding and all, where no batch is given: logits take 4 bytes a word each."""

DRAWING = ("temperature", "top_k", "top_p", "min_p")
"""Arguments that mean nothing to greedy decoding."""

Report = Callable[[int, int], None]
Progress = Callable[[str], AbstractContextManager[Report]]
Request = tuple[tuple[str, str], list[int], list[int]]  # the texts; tokens before; tokens to score
Score = tuple[float, bool]


@contextlib.contextmanager
def _silent(label: str) -> Iterator[Report]:
    yield lambda done, total: None


@dataclass(frozen=True)
class Language:
    """A tokenizer, and the ids of the tokens that begin and end a text."""

    tokenizer: Tokenizer
    first: int
    last: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, eos: int) -> Language:
        """A text begins with what the tokenizer puts before it, or else with what ends one."""
        before = tokenizer.encode("").ids
        return cls(tokenizer, before[0] if before else eos, eos)

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Tokens of a text, special ones added unless it begins with one already."""
        if special is None:
            special = not text.startswith(self.decode([self.first]))
        return list(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], skip: bool = False) -> str:
        """The text of tokens, `skip` leaves special ones out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip))


class HarnessModel(TemplateLM):
    """`model(ids, states=...)` to logits and states, with a tokenizer, as a model of lm-eval.

    Texts are split into tokens as lm-eval's own model for transformers does it, and windows have at
    most `longest` tokens, so that the scores of the two compare. Requests run longest first,
    `batch` at a time (None: as many as have TOKENS tokens together), filled up behind, where
    nothing is scored: what comes later changes nothing in a recurrent model. `device` is where
    tokens are put. `ranks` are processes that have the same requests and share their batches;
    lm-eval knows nothing of them, and each has all results.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        eos: int,
        device: torch.device | None = None,
        *,
        batch: int | None = None,
        longest: int = LONGEST,
        progress: Progress = _silent,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.model, self.ranks = model, ranks or Ranks()
        self.language = Language.of(tokenizer, eos)
        self.batch, self.longest, self.progress = batch, longest, progress
        self._device = device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.language.last

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing in front."""
        return self.language.first

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text."""
        return self.language.encode(string, add_special_tokens)

    # -- scoring ------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Score]:
        """For each (context, continuation): log p, and whether it is what greedy decoding says."""
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """log p of each whole text; of a long one window by window, each token once."""
        parts: list[Request] = []
        owners = []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.longest, 1
            )
            for before, scored in map(make_disjoint_window, windows):
                parts.append((("", ""), before, scored))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(parts), strict=True):
            sums[i] += value
        return sums

    def _loglikelihood_tokens(self, requests: list[Request], **kwargs: Any) -> list[Score]:
        """Scores in the order of the requests; equal inputs run once."""
        inputs = [self._input(request) for request in requests]
        wanted: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(inputs):
            wanted.setdefault(row, []).append(i)
        batches = self._batches(sorted(wanted, key=len, reverse=True))

        def run(job: Sequence[int]) -> Iterator[Score]:
            rows = list(dict.fromkeys(inputs[i] for i in job))
            logits = dict(zip(rows, self._logits(rows), strict=True))
            for i in job:
                yield _score(logits[inputs[i]][: len(inputs[i])], requests[i][2])

        jobs = [[i for row in rows for i in wanted[row]] for rows in batches]
        scores = self._share("scoring", requests, jobs, run)
        return [(value, greedy) for value, greedy in scores]

    def _input(self, request: Request) -> tuple[int, ...]:
        """All tokens but the last, at most `longest`, cut off in front."""
        (_, continuation), before, scored = request
        if not 1 <= len(scored) <= self.longest:
            raise UsageError(
                f"a continuation of {len(scored)} tokens cannot be scored: {continuation[:40]!r}",
                hint=f"1 to {self.longest} tokens can",
            )
        return tuple((before + scored)[-self.longest - 1 : -1])

    def _batches(self, rows: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
        """Rows, the longest first, some at a time."""
        start = 0
        while start < len(rows):
            count = self.batch or max(1, TOKENS // len(rows[start]))
            yield rows[start : start + count]
            start += count

    def _logits(self, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """[rows, length of the first, vocabulary]."""
        padding = self.eot_token_id
        ids = [[*row, *[padding] * (len(rows[0]) - len(row))] for row in rows]
        logits, _ = self.model(torch.tensor(ids, device=self._device))
        return logits

    # -- generating ---------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What follows each prompt up to a stop string, an end of text or enough tokens.

        Prompts of one length and of the same arguments run together. Raises UsageError for
        arguments that Sampling does not know.
        """
        alike: dict[tuple[int, str], list[int]] = {}
        prompts = []
        for i, request in enumerate(requests):
            text, arguments = request.args
            limit = normalize_gen_kwargs(arguments)["max_gen_toks"]
            prompt = self.tok_encode(text)[-max(1, self.longest - limit) :]
            prompts.append(prompt or [self.prefix_token_id])
            alike.setdefault((len(prompts[i]), repr(arguments)), []).append(i)
        batch = self.batch or 1
        groups = [alike[key] for key in sorted(alike, reverse=True)]
        jobs = [group[i : i + batch] for group in groups for i in range(0, len(group), batch)]

        def run(job: Sequence[int]) -> list[str]:
            return self._go_on([prompts[i] for i in job], requests[job[0]].args[1])

        return self._share("generating", [request.args for request in requests], jobs, run)

    def _go_on(self, prompts: list[list[int]], arguments: dict[str, Any]) -> list[str]:
        """The texts behind prompts of one length."""
        given = dict(normalize_gen_kwargs(arguments))
        limit = given.pop("max_gen_toks")
        stops = handle_stop_sequences(given.pop("until"), self.language.decode([self.eot_token_id]))
        made: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        open_rows = set(range(len(prompts)))
        ids = torch.tensor(prompts, device=self._device)
        with contextlib.closing(stream(self.model, ids, limit, _sampling(given))) as following:
            for token in following:
                for i in list(open_rows):
                    made[i].append(int(token[i]))
                    texts[i], stopped = _cut(self.language.decode(made[i]), stops)
                    open_rows -= {i} if stopped else set()
                if not open_rows:
                    break
        return texts

    # -- processes ----------------------------------------------------------------------------

    def _share(
        self,
        label: str,
        requests: Sequence[Any],
        jobs: Sequence[Sequence[int]],
        run: Callable[[Sequence[int]], Iterable[Any]],
    ) -> list[Any]:
        """What `run` gives for each request, in their order; a job is numbers of some.

        Every process runs its own jobs, and learns what the others gave. RankError where these
        have other requests.
        """
        self._check_alike(requests)
        mine, done = self.ranks.deal(jobs), Saved({"results": []})
        results, total = done.about["results"], sum(map(len, mine))
        with self.progress(label) as report:
            for job in mine:
                report(len(results), total)
                results += zip(job, run(job), strict=True)
            report(total, total)
        found = dict(pair for part in self.ranks.gather(done) for pair in part.about["results"])
        return [found[i] for i in range(len(requests))]

    def _check_alike(self, requests: Sequence[Any]) -> None:
        if self.ranks.count == 1:
            return
        digest = hashlib.sha256()
        for request in requests:
            digest.update(repr(request).encode())
        told = self.ranks.gather(Saved({"digest": digest.hexdigest()}))
        if len({part.about["digest"] for part in told}) > 1:
            raise RankError(
                "the processes of this run have different documents of a task",
                hint="its data differ between hosts, or are drawn without a seed",
            )


def _score(logits: torch.Tensor, scored: list[int]) -> Score:
    """Of the last tokens of a row, from the logits before each, [length, vocabulary]."""
    rows = logits[-len(scored) :].float().log_softmax(-1)
    ids = torch.tensor(scored, device=rows.device)
    greedy = bool((rows.argmax(-1) == ids).all())
    return rows.gather(1, ids[:, None]).double().sum().item(), greedy


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first of the stop strings, and whether there is one."""
    places = [text.find(stop) for stop in stops if stop and stop in text]
    return (text[: min(places)], True) if places else (text, False)


def _sampling(arguments: dict[str, Any]) -> Sampling:
    """How tokens are drawn; UsageError for arguments that are not known."""
    drawn = arguments.pop("do_sample", False)
    if not drawn:
        arguments = {k: v for k, v in arguments.items() if k not in DRAWING}
    known = {field.name for field in fields(Sampling)}
    if unknown := sorted(set(arguments) - known):
        raise UsageError(
            f"this task generates with {', '.join(unknown)}, which is not known here",
            hint=f"known are {', '.join(sorted(known))}",
        )
    return Sampling(**arguments)
