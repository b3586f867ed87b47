"""A model of ours as lm-eval sees one: it scores continuations and goes on from prompts.

Importing this module needs lm-eval (the extra `eval`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ssmc.errors import UsageError
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
    tokens are put.
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
    ) -> None:
        super().__init__()
        self.model = model
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
        wanted: dict[tuple[int, ...], list[int]] = {}
        for i, request in enumerate(requests):
            wanted.setdefault(self._input(request), []).append(i)
        scores: dict[int, Score] = {}
        with self.progress("scoring") as report:
            for rows in self._batches(sorted(wanted, key=len, reverse=True)):
                report(len(scores), len(requests))
                logits = self._logits(rows)
                for row, line in zip(rows, logits, strict=True):
                    for i in wanted[row]:
                        scores[i] = _score(line[: len(row)], requests[i][2])
            report(len(scores), len(requests))
        return [scores[i] for i in range(len(requests))]

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
        texts: dict[int, str] = {}
        with self.progress("generating") as report:
            for group in alike.values():
                for start in range(0, len(group), self.batch or 1):
                    report(len(texts), len(requests))
                    chosen = group[start : start + (self.batch or 1)]
                    ids = [prompts[i] for i in chosen]
                    texts |= zip(chosen, self._go_on(ids, requests[chosen[0]].args[1]), strict=True)
            report(len(texts), len(requests))
        return [texts[i] for i in range(len(requests))]

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
