"""`generate` as transformers spells it: the same names with the same meaning."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ssmc.errors import UsageError, did_you_mean
from ssmc.runtime.generate import Model, follow, pad, stream
from ssmc.runtime.padding import real_tokens
from ssmc.runtime.sampling import Sampling
from ssmc.runtime.text import Continuation, Ending

NEW_TOKENS = 64
# What transformers has, too, and what it has to be here.
FIXED = {
    "use_cache": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_scores": False,
    "synced_gpus": False,
}


class Streamer(Protocol):
    """What hears of tokens as they come: a streamer of transformers, say."""

    def put(self, value: Tensor) -> None:
        """The prompts [batch, length], then one token a sequence [batch], on the CPU."""

    def end(self) -> None:
        """No more tokens follow."""


def generate(
    model: Model,
    input_ids: Tensor,
    max_new_tokens: int | None = None,
    *,
    attention_mask: Tensor | None = None,
    max_length: int | None = None,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    streamer: Streamer | None = None,
    seed: int = 0,
    **others: Any,
) -> Tensor:
    """`input_ids` [batch, length] with up to `max_new_tokens` (64) tokens behind.

    Arguments mean what they mean to `GenerationMixin.generate` of transformers, whose defaults
    they have: greedy, and with `do_sample` temperature 1 and the 50 likeliest tokens (`top_k=0`
    for all). What is drawn depends on `seed` alone, sequence r of the batch on seed + r.

    - `attention_mask` [batch, length] is 0 where a prompt is padded, on its left. Padding is not
      run: a prompt gives what it gives alone.
    - `max_length` counts the prompt, too; `max_new_tokens` goes before it.
    - A sequence ends with one of `eos_token_id`, or with the token that completes one of
      `stop_strings` in the text of what is new. Behind its end it holds `pad_token_id` (the first
      of `eos_token_id`).
    - `tokenizer`, for stop strings, is a `tokenizers.Tokenizer` or a fast one of transformers.

    Raises UsageError for an empty prompt, values out of range, and arguments of other names.
    """
    _refuse(others)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampling = _sampling(do_sample, given, repetition_penalty, seed)
    ending = _ending(eos_token_id, stop_strings, tokenizer)
    filler = _filler(pad_token_id, eos_token_id, several=len(input_ids) > 1 and bool(ending.stop))
    prompts = _prompts(input_ids, attention_mask)
    count = _count(max_new_tokens, max_length, input_ids.shape[1])
    rows = [Continuation(ending, ids.tolist() if ending.tokenizer else ()) for ids in prompts]
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for _ in follow(stream(model, prompts, count, sampling), rows):
        if streamer is not None:
            longest = max(len(row.tokens) for row in rows)
            last = [row.tokens[-1] if len(row.tokens) == longest else filler for row in rows]
            streamer.put(torch.tensor(last))
    if streamer is not None:
        streamer.end()
    return torch.cat([input_ids, pad((row.tokens for row in rows), filler).to(input_ids)], 1)


def _refuse(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is None or (name in FIXED and value == FIXED[name]):
            continue
        known = [
            n for n, p in inspect.signature(generate).parameters.items() if p.kind != p.VAR_KEYWORD
        ]
        hint = f"only {name}={FIXED[name]} is" if name in FIXED else did_you_mean(name, known[1:])
        raise UsageError(f"generate: {name}={value!r} is not supported", hint=hint)


def _sampling(do_sample: bool, given: dict[str, Any], penalty: float | None, seed: int) -> Sampling:
    given = {name: value for name, value in given.items() if value is not None}
    kept: dict[str, Any] = {"repetition_penalty": 1.0 if penalty is None else penalty, "seed": seed}
    if not do_sample:
        if given:
            text = f"generate: {', '.join(given)} without do_sample=True has no effect"
            warnings.warn(text, UserWarning, stacklevel=4)
        return Sampling(**kept)
    values = {"temperature": 1.0, "top_k": 50} | given
    if values["temperature"] == 0:
        raise UsageError("temperature 0 draws nothing", hint="do_sample=False is greedy")
    return Sampling(**kept, **values | {"top_k": values["top_k"] or None})


def _ending(eos: Any, stop: str | Sequence[str] | None, tokenizer: Any) -> Ending:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)  # of a fast one of transformers
    return Ending(frozenset(_ids(eos)), strings, backend if strings else None)


def _ids(eos: int | Iterable[int] | None) -> list[int]:
    return [] if eos is None else torch.as_tensor(eos, dtype=torch.int64).flatten().tolist()


def _filler(pad_token_id: int | None, eos: Any, several: bool) -> int:
    if pad_token_id is not None:
        return pad_token_id
    ends = _ids(eos)
    if several and not ends:
        raise UsageError(
            "sequences that end at stop strings have different lengths", hint="give pad_token_id="
        )
    return ends[0] if ends else 0


def _count(new: int | None, whole: int | None, length: int) -> int:
    count = new if new is not None else NEW_TOKENS if whole is None else whole - length
    if count < 1:
        raise UsageError(
            f"{count} new tokens behind a prompt of {length}",
            hint="use a max_new_tokens of 1 or more",
        )
    return count


def _prompts(ids: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
    if ids.dim() != 2:
        raise UsageError(f"input_ids of shape {list(ids.shape)}", hint="they are [batch, length]")
    if mask is None:
        return list(ids)
    spans = real_tokens(mask, ids)
    if spans is None:
        return list(ids)
    padded = next((row for row, (_, end) in enumerate(spans) if end < ids.shape[1]), None)
    if padded is not None:
        raise UsageError(
            f"row {padded} of attention_mask ends in padding", hint="pad prompts on their left"
        )
    return [row[start:] for row, (start, _) in zip(ids, spans, strict=True)]
