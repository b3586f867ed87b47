"""Chat templates: how the messages of a conversation become the text that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ssmc.core.disk import read_json
from ssmc.errors import UsageError

Message = dict[str, str]  # `role` (system, user or assistant) and `content`


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template as transformers defines it, and the special tokens that it names.

    `stop` are the strings that end an answer, where no token does.
    """

    template: str
    tokens: dict[str, str] = field(default_factory=dict)
    stop: tuple[str, ...] = ()

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to where the next answer begins.

        Raises UsageError where the template refuses the messages or is none.
        """
        from jinja2 import TemplateError

        try:
            text: str = self._renderer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise UsageError(
                f"the chat template refuses the conversation: {error}",
                hint="not all take a --system message",
            ) from None
        return text

    @cached_property
    def _renderer(self) -> Any:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        empty = Tokenizer(models.BPE())  # a template sees the text of tokens alone
        return PreTrainedTokenizerFast(
            tokenizer_object=empty, chat_template=self.template, **self.tokens
        )


PLAIN = ChatTemplate(
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'User: ' + message.content + '\\nAssistant:' }}"
    "{% elif message.role == 'assistant' %}{{ message.content + '\\n' }}"
    "{% else %}{{ message.content + '\\n\\n' }}{% endif %}"
    "{% endfor %}",
    stop=("\nUser:",),
)


def read_chat_template(folder: Path) -> dict[str, Any] | None:
    """The chat template of a model's folder as plain data, None where it has none.

    It is in `chat_template.jinja` or in `tokenizer_config.json`, where there is also the text of
    the special tokens. The data has the fields `template` and `tokens` of a ChatTemplate. Raises
    UsageError for JSON that is broken.
    """
    settings = folder / "tokenizer_config.json"
    config = read_json(settings) if settings.is_file() else {}
    file = folder / "chat_template.jinja"
    written = file.read_text(encoding="utf-8") if file.is_file() else None
    template = written or _default(config.get("chat_template"))
    if template is None:
        return None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    tokens = {name: _text(config[name]) for name in names if config.get(name)}
    return {"template": template, "tokens": tokens}


def _default(found: Any) -> str | None:
    """One template, or that called `default` of several."""
    if isinstance(found, list):
        return next((t["template"] for t in found if t["name"] == "default"), None)
    return found


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
