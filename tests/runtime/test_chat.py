"""Chat: the history is in the states, of each turn only what is new is run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ssmc
from ssmc.core import Graph
from ssmc.errors import UsageError
from ssmc.frontend import Model
from ssmc.runtime.chat import Chat
from ssmc.runtime.sampling import Sampling
from ssmc.runtime.session import Session
from ssmc.runtime.template import PLAIN, ChatTemplate, Message, read_chat_template
from ssmc.runtime.text import Ending

CPU = torch.device("cpu")
CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] | trim) + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
QUESTIONS = ("What is the law?", "And who wrote it?", "Thank you.")


@pytest.fixture(scope="module")
def model() -> Model:
    return ssmc.load_model("demo")


@pytest.fixture(scope="module")
def graph(model: Model) -> Graph:
    return ssmc.trace(model.module)


class Counted:
    """A session that remembers what it ran, and the logits behind it."""

    def __init__(self, graph: Graph) -> None:
        self.session = Session(lambda form: graph, 1, CPU)
        self.prefilled: list[list[int]] = []
        self.steps = 0
        self.resets = -1  # the first is the beginning
        self.logits = torch.zeros(0)

    def prefill(self, ids: Tensor) -> Tensor:
        self.prefilled.append(ids[0].tolist())
        self.logits = self.session.prefill(ids)
        return self.logits

    def prefill_each(self, prompts: Sequence[Tensor]) -> Tensor:
        raise AssertionError("there is one sequence")

    def step(self, ids: Tensor) -> Tensor:
        self.steps += 1
        self.logits = self.session.step(ids)
        return self.logits

    def reset(self) -> None:
        self.resets += 1
        self.session.reset()


def from_scratch(graph: Graph, ids: list[int]) -> Tensor:
    return graph(torch.tensor([ids]))[0][:, -1]


def talk(
    model: Model, graph: Graph, template: ChatTemplate, **options: Any
) -> tuple[Counted, Chat]:
    sequences = Counted(graph)
    ending = Ending(frozenset({0}), options.pop("stop", ()))
    assert model.tokenizer is not None
    options = {"max_new_tokens": 20, "sampling": Sampling(0.8, seed=4)} | options
    if ending.stop:
        ending = Ending(ending.eos, ending.stop, model.tokenizer)
    return sequences, Chat(sequences, template, model.tokenizer, ending, **options)


@pytest.mark.parametrize("template", [PLAIN, ChatTemplate(CHATML, TOKENS)], ids=["plain", "chatml"])
@pytest.mark.parametrize("system", ["", "You know the law."])
def test_only_the_new_turn_is_run(
    model: Model, graph: Graph, template: ChatTemplate, system: str
) -> None:
    sequences, chat = talk(model, graph, template, system=system)
    for turn, question in enumerate(QUESTIONS):
        before, pending = list(chat.tokens), chat._held.chosen if chat._held else []
        sequences.steps = 0
        pieces = list(chat.say(question))
        assert "".join(pieces) == chat.messages[-1]["content"]
        assert len(sequences.prefilled) == turn + 1
        new = sequences.prefilled[-1]
        text = model.tokenizer.decode(new, skip_special_tokens=False)  # type: ignore[union-attr]
        assert question in text
        if turn:
            assert new[: len(pending)] == pending
            assert chat.messages[-3]["content"][:20] not in text
            assert len(new) < 45
        assert chat.tokens == [*before, *new, *chat.tokens[len(before) + len(new) :]]
        assert len(chat.tokens) == len(before) + len(new) + sequences.steps
        expected = from_scratch(graph, chat.tokens)
        assert torch.allclose(sequences.logits, expected, rtol=1e-4, atol=1e-4)
    assert sequences.resets == 0
    roles = [message["role"] for message in chat.messages]
    assert roles == ["system"] * bool(system) + ["user", "assistant"] * 3


def test_the_states_have_read_what_the_template_writes(model: Model, graph: Graph) -> None:
    template = ChatTemplate(CHATML, TOKENS)
    _, chat = talk(model, graph, template)
    for question in QUESTIONS:
        list(chat.say(question))
    *earlier, answer = chat.messages
    written = template.render(earlier) + answer["content"]
    assert model.tokenizer is not None
    read = model.tokenizer.decode([*chat.tokens, *chat._held.chosen], skip_special_tokens=False)  # type: ignore[union-attr]
    assert "".join(read.split()) == "".join(written.split())  # but for the space around answers


def test_the_first_prompt_has_the_tokens_that_transformers_gives(
    model: Model, graph: Graph
) -> None:
    from transformers import PreTrainedTokenizerFast

    sequences, chat = talk(model, graph, ChatTemplate(CHATML, TOKENS), system="Be brief.")
    list(chat.say("Hello"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model.tokenizer, chat_template=CHATML, **TOKENS
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert sequences.prefilled[0] == expected


def test_answers_that_end_by_themselves(model: Model, graph: Graph) -> None:
    """Of an answer cut at a stop string the states have read the string, and do not again."""
    _, chat = talk(model, graph, PLAIN, sampling=Sampling())
    whole = "".join(chat.say(QUESTIONS[0]))
    marker = whole.split()[3]
    template = ChatTemplate(PLAIN.template.replace("'\\n'", f"'{marker}'"), stop=(marker,))
    sequences, chat = talk(model, graph, template, sampling=Sampling())
    said = "".join(chat.say(QUESTIONS[0]))
    assert said == whole[: whole.index(marker)]
    list(chat.say(QUESTIONS[1]))
    assert sequences.resets == 0
    text = model.tokenizer.decode(chat.tokens)  # type: ignore[union-attr]
    expected = f"User: {QUESTIONS[0]}\nAssistant:{said}{marker}User: {QUESTIONS[1]}\nAssistant:"
    assert text.startswith(expected)


def test_white_space_that_a_template_takes_away_stays_in_the_states(
    model: Model, graph: Graph
) -> None:
    template = ChatTemplate(
        PLAIN.template.replace("{{ message.content +", "{{ message.content|trim +")
    )
    assert "|trim" in template.template
    sequences, chat = talk(model, graph, template)
    answers = ["".join(chat.say(question)) for question in QUESTIONS]
    assert any(answer != answer.strip() for answer in answers[:2])
    assert sequences.resets == 0
    text = model.tokenizer.decode(chat.tokens)  # type: ignore[union-attr]
    for question, answer in zip(QUESTIONS, answers[:2], strict=False):
        assert f"User: {question}\nAssistant:{answer}" in text


def test_the_end_token_is_the_templates_own(model: Model, graph: Graph) -> None:
    _, chat = talk(model, graph, PLAIN, sampling=Sampling())
    list(chat.say(QUESTIONS[0]))
    prompt = model.tokenizer.encode(PLAIN.render(chat.messages[:1])).ids  # type: ignore[union-attr]
    made = chat.tokens[len(prompt) :]
    third = model.tokenizer.id_to_token(made[2])  # type: ignore[union-attr]
    template = ChatTemplate(PLAIN.template, {"eos_token": third})
    sequences, chat = talk(model, graph, template, sampling=Sampling())
    list(chat.say(QUESTIONS[0]))
    assert chat.tokens == [*prompt, *made[:2]]
    list(chat.say(QUESTIONS[1]))
    assert sequences.prefilled[1][0] == model.tokenizer.encode("\nUser").ids[0]  # type: ignore[union-attr]
    assert sequences.resets == 0


def test_a_template_that_changes_what_was_read_is_run_again(model: Model, graph: Graph) -> None:
    template = ChatTemplate(PLAIN.template.replace("{{ message.content + '\\n' }}", "(said)\n"))
    sequences, chat = talk(model, graph, template)
    list(chat.say(QUESTIONS[0]))
    list(chat.say(QUESTIONS[1]))
    assert sequences.resets == 1
    text = model.tokenizer.decode(sequences.prefilled[1])  # type: ignore[union-attr]
    assert text == f"User: {QUESTIONS[0]}\nAssistant:(said)\nUser: {QUESTIONS[1]}\nAssistant:"
    assert torch.allclose(sequences.logits, from_scratch(graph, chat.tokens), rtol=1e-4, atol=1e-4)


def test_an_answer_that_is_stopped_stays(model: Model, graph: Graph) -> None:
    sequences, chat = talk(model, graph, PLAIN, sampling=Sampling())
    asked = iter([False, False, False, True])
    said = "".join(chat.say(QUESTIONS[0], until=lambda: next(asked)))
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    assert sequences.steps == 3
    list(chat.say(QUESTIONS[1]))
    assert sequences.resets == 0
    assert said in model.tokenizer.decode(chat.tokens)  # type: ignore[union-attr]


def test_an_answer_that_is_not_read_to_its_end_is_none(model: Model, graph: Graph) -> None:
    sequences, chat = talk(model, graph, PLAIN)
    answer = chat.say(QUESTIONS[0])
    next(answer)
    answer.close()
    assert chat.messages == []
    list(chat.say(QUESTIONS[1]))
    text = model.tokenizer.decode(sequences.prefilled[1])  # type: ignore[union-attr]
    assert text == f"User: {QUESTIONS[1]}\nAssistant:"
    assert torch.allclose(sequences.logits, from_scratch(graph, chat.tokens), rtol=1e-4, atol=1e-4)


def test_reset_and_seeds(model: Model, graph: Graph) -> None:
    _, chat = talk(model, graph, PLAIN, system="You know the law.")
    first = ["".join(chat.say(QUESTIONS[0])) for _ in range(2)]
    assert first[0] != first[1]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "You know the law."}]
    assert chat.tokens == []
    assert ["".join(chat.say(QUESTIONS[0])) for _ in range(2)] == first


# -- templates --------------------------------------------------------------------------------

HELLO: list[Message] = [{"role": "user", "content": "Hello"}]


def write(folder: Path, config: dict[str, Any] | None, jinja: str | None = None) -> Path:
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


@pytest.mark.parametrize(
    ("config", "jinja", "expected"),
    [
        (None, None, None),
        ({"bos_token": "<s>"}, None, None),
        ({"chat_template": "A"}, None, {"template": "A", "tokens": {}}),
        ({"chat_template": "A", "eos_token": None}, "B", {"template": "B", "tokens": {}}),
        (None, "B", {"template": "B", "tokens": {}}),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "T"},
                    {"name": "default", "template": "A"},
                ],
                "bos_token": {"content": "<s>", "lstrip": False},
                "eos_token": "</s>",
            },
            None,
            {"template": "A", "tokens": {"bos_token": "<s>", "eos_token": "</s>"}},
        ),
        ({"chat_template": [{"name": "tool_use", "template": "T"}]}, None, None),
    ],
)
def test_templates_are_found(
    tmp_path: Path, config: dict[str, Any] | None, jinja: str | None, expected: Any
) -> None:
    assert read_chat_template(write(tmp_path, config, jinja)) == expected


def test_templates_that_are_broken(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer_config.json, line 1: Expecting"):
        read_chat_template(tmp_path)
    for template in (
        "{% for %}",
        "{{ raise_exception('no system here') }}",
        "{{ nothing.at.all }}",
    ):
        with pytest.raises(UsageError, match="the chat template refuses the conversation"):
            ChatTemplate(template).render(HELLO)


def test_templates_run_in_a_sandbox() -> None:
    with pytest.raises(UsageError, match="unsafe"):
        ChatTemplate("{{ ''.__class__.__mro__ }}").render(HELLO)


def test_the_plain_template() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": " Hi."},
        {"role": "user", "content": "Bye"},
    ]
    assert (
        PLAIN.render(messages) == "Be brief.\n\nUser: Hello\nAssistant: Hi.\nUser: Bye\nAssistant:"
    )


def test_an_artefact_keeps_the_template(tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    write(folder, {"chat_template": CHATML, **TOKENS})
    text = folder / "text.txt"
    compiled = ssmc.compile(str(folder), calibration=text, samples=2, length=16, passes="absmax")
    compiled.save(tmp_path / "out")
    kept = ssmc.load(tmp_path / "out").about["chat"]
    assert ChatTemplate(**kept) == ChatTemplate(CHATML, TOKENS)
