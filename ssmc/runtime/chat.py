"""A conversation whose history is in the states: of each turn only what is new is run."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer

from ssmc.runtime.generate import Sequences, decode, follow
from ssmc.runtime.sampling import Sampler, Sampling
from ssmc.runtime.template import ChatTemplate, Message
from ssmc.runtime.text import Continuation, Ending, text_behind


@dataclass(frozen=True)
class _Held:
    """What the states have read: `tokens`, and of the last turn its prompt and answer as text.

    `chosen` is the last token of the answer, which is in its text, but has not been run.
    """

    tokens: list[int]
    chosen: list[int]
    prompt: str
    answer: str

    def rest_of(self, prompt: str) -> str | None:
        """What of `prompt` comes behind that; None where it begins otherwise."""
        if not prompt.startswith(self.prompt):
            return None
        behind = prompt[len(self.prompt) :]
        if behind.startswith(self.answer):
            return behind[len(self.answer) :]
        bare, behind = self.answer.strip(), behind.lstrip()  # as many templates write answers
        return behind[len(bare) :] if behind.startswith(bare) else None


class Chat:
    """A conversation with a decoder of one sequence, a session say.

    `messages` is the history, `tokens` what the states have read. Where the template now writes
    what came before in another way (an answer without its reasoning, say), the conversation is run
    again from its start; white space around an answer does not count.

    An answer ends as `ending` says, or with the template's end-of-text token or stop string, or
    after `max_new_tokens`. Turn n draws by the seed of `sampling` plus n, counted from 0.
    """

    def __init__(
        self,
        sequences: Sequences,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        ending: Ending,
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
        system: str = "",
    ) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.sampling, self.max_new_tokens = sampling or Sampling(), max_new_tokens
        self._sequences = sequences
        self._first = [{"role": "system", "content": system}] if system else []
        end = tokenizer.token_to_id(template.tokens.get("eos_token", ""))
        eos = ending.eos if end is None else ending.eos | {end}
        self._ending = Ending(eos, (*ending.stop, *template.stop), tokenizer)
        self.reset()

    @property
    def tokens(self) -> list[int]:
        """What the states have read, in order."""
        return self._held.tokens if self._held else []

    def reset(self) -> None:
        """Begin a new conversation."""
        self.messages: list[Message] = list(self._first)
        self._held: _Held | None = None

    def say(
        self, text: str, until: Callable[[], bool] = lambda: False
    ) -> Generator[str, None, None]:
        """The answer to a message, in pieces, one a token: some are empty, as text is held back.

        It ends early with `until()`, which is asked at each token. An answer that is not read to
        its end is no part of the conversation. Raises UsageError where the template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.template.render(messages)
        new = self._leading_to(prompt)
        before = [*self.tokens, *new]
        self._held = None  # until all has gone well
        logits = self._sequences.prefill(torch.tensor([new]))
        turn = sum(message["role"] == "user" for message in self.messages)
        sampling = replace(self.sampling, seed=self.sampling.seed + turn)
        context = torch.tensor(before, device=logits.device)
        sampler = Sampler(sampling, [context], self.max_new_tokens, logits.device)
        answer = Continuation(self._ending, before)
        chosen = decode(self._sequences, logits, sampler, self.max_new_tokens)
        for (piece,) in follow(chosen, [answer], until):
            yield piece
        yield answer.finish()
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._held = self._after(prompt, before, answer)

    def _leading_to(self, prompt: str) -> list[int]:
        """The tokens between what the states have read and the end of `prompt`."""
        rest = self._held.rest_of(prompt) if self._held else None
        if self._held is None or rest is None:
            self._held = None
            self._sequences.reset()
            return self._encode(prompt)
        return [*self._held.chosen, *self._encode(rest)]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _after(self, prompt: str, before: list[int], answer: Continuation) -> _Held:
        *run, last = answer.tokens
        chosen = [] if answer.ended == "eos" else [last]  # the template writes its own end
        raw = text_behind(self.tokenizer, before, [*run, *chosen], special=True)
        return _Held([*before, *run], chosen, prompt, raw)
