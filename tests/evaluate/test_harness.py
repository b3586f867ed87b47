"""Our models under lm-eval: log-likelihoods are those of its own model for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ended, start

from ssmc.cli.target import Target, open_target
from ssmc.corpus import read_texts
from ssmc.demo import evaluation_file, model_folder
from ssmc.errors import UsageError
from ssmc.evaluate.embedded import passages, questions
from ssmc.runtime.generate import stream

pytest.importorskip("lm_eval", reason="needs lm-eval: make test-eval")

from lm_eval.api.instance import Instance

from ssmc.evaluate.harness import HarnessModel

Pairs = list[tuple[Any, ...]]
STOP: dict[str, Any] = {"until": [".", "\n"], "max_gen_toks": 12, "do_sample": False}


def requests(kind: Any, rows: Pairs) -> list[Instance]:
    return [Instance(kind, {}, row, i) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def demo() -> Target:
    return open_target("demo", device="cpu")


def harness(target: Target, **options: Any) -> HarnessModel:
    return HarnessModel(target.run, *target.encoder(), target.device, **options)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """Contexts and continuations: words, sentences, none before, a space at the end."""
    texts = read_texts(evaluation_file())
    words = [(p.rpartition(" ")[0], f" {p.rpartition(' ')[2]}") for p in list(passages(texts))[:5]]
    asked = list(questions(texts))[:2]
    sentences = [(q["ctx"], f" {ending}") for q in asked for ending in q["endings"]]
    return [*words, *sentences, ("", "Hello world"), ("The end ", "of it"), ("a b " * 200, "c")]


@pytest.fixture(scope="module")
def pages() -> Pairs:
    return [(text[:900],) for text in read_texts(evaluation_file())[:3]]


@pytest.fixture(scope="module")
def transformers_model() -> Any:
    """lm-eval's own model for transformers, with the embedded weights and windows of 256 tokens."""
    pytest.importorskip("accelerate", reason="lm-eval needs accelerate to run transformers")
    from lm_eval.models.huggingface import HFLM

    folder = str(model_folder())
    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=4, max_length=256)


def test_continuations_score_as_in_transformers(
    demo: Target, pairs: Pairs, transformers_model: Any
) -> None:
    ours = harness(demo, longest=256).loglikelihood(requests("loglikelihood", pairs))
    theirs = transformers_model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert [s[0] for s in ours] == pytest.approx([s[0] for s in theirs], abs=1e-4)
    assert [s[1] for s in ours] == [s[1] for s in theirs]


def test_texts_score_as_in_transformers_window_by_window(
    demo: Target, pages: Pairs, transformers_model: Any
) -> None:
    kind = "loglikelihood_rolling"
    ours = harness(demo, longest=100).loglikelihood_rolling(requests(kind, pages))
    transformers_model._max_length = 100
    theirs = transformers_model.loglikelihood_rolling(requests(kind, pages), disable_tqdm=True)
    transformers_model._max_length = 256
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_it_goes_on_as_in_transformers(demo: Target, transformers_model: Any) -> None:
    rows = [(p, STOP) for p in ("The President of the United", "Jesus said to", "In the")]
    ours = harness(demo).generate_until(requests("generate_until", rows))
    theirs = transformers_model.generate_until(requests("generate_until", rows), disable_tqdm=True)
    assert ours == theirs


def test_a_batch_and_its_padding_change_nothing(demo: Target, pairs: Pairs) -> None:
    one, many = (
        harness(demo, batch=batch).loglikelihood(requests("loglikelihood", pairs))
        for batch in (1, 16)
    )
    assert [s[0] for s in one] == pytest.approx([s[0] for s in many], abs=1e-4)


def test_inputs_that_are_equal_run_once(demo: Target) -> None:
    calls: list[torch.Size] = []

    def model(ids: torch.Tensor) -> Any:
        calls.append(ids.shape)
        return demo.run(ids)

    rows: Pairs = [("It is", f" {word}") for word in ("a", "the", "not")]
    counted = HarnessModel(model, *demo.encoder(), demo.device)
    scores = counted.loglikelihood(requests("loglikelihood", rows))
    assert calls == [torch.Size([1, 2])]
    assert scores == harness(demo, batch=1).loglikelihood(requests("loglikelihood", rows))


def test_simulated_and_lowered_score_alike(demo_folder: Path, pairs: Pairs) -> None:
    target = open_target(str(demo_folder), backend="reference", device="cpu")
    assert target.compiled is not None
    found = []
    for execution in ("simulated", "lowered"):
        target.compiled.execution = execution  # type: ignore[assignment]
        found.append(harness(target).loglikelihood(requests("loglikelihood", pairs[:6])))
    assert found[0] == found[1]


def test_prompts_run_to_a_stop_string_each(demo: Target) -> None:
    rows = [(p, STOP) for p in ("Jesus said to", "Moses said to", "In the beginning")]
    ours = harness(demo, batch=4).generate_until(requests("generate_until", rows))
    tokenizer, _ = demo.encoder()
    for (prompt, _), text in zip(rows, ours, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        whole = [int(token) for token in stream(demo.run, ids, 12)]
        expected = tokenizer.decode(whole, skip_special_tokens=False)
        for stop in (*STOP["until"], "<|endoftext|>"):
            expected = expected.split(stop)[0]
        assert text == expected


def test_arguments_of_drawing_are_those_of_sampling(demo: Target) -> None:
    drawn = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    rows = [("In the beginning", drawn)] * 2
    one, two = harness(demo).generate_until(requests("generate_until", rows))
    assert one == two  # the seed is fixed
    greedy = [("In the beginning", drawn | {"do_sample": False})]
    assert harness(demo).generate_until(requests("generate_until", greedy)) != [one]
    beams = [("In the beginning", drawn | {"num_beams": 4})]
    with pytest.raises(UsageError, match="generates with num_beams"):
        harness(demo).generate_until(requests("generate_until", beams))


def test_a_continuation_without_tokens_or_longer_than_a_window_is_refused(demo: Target) -> None:
    short = harness(demo, longest=4)
    with pytest.raises(UsageError, match="of 0 tokens cannot be scored"):
        short.loglikelihood(requests("loglikelihood", [("It is", "")]))
    with pytest.raises(UsageError, match="of 6 tokens cannot be scored: ' a b"):
        short.loglikelihood(requests("loglikelihood", [("It is", " a b c d e f")]))


SHARED = """
import json
import torch
from lm_eval.api.instance import Instance
from ssmc.cli.target import open_target
from ssmc.core.ranks import join
from ssmc.corpus import read_texts
from ssmc.demo import evaluation_file
from ssmc.errors import RankError
from ssmc.evaluate.harness import HarnessModel

torch.set_num_threads(1)
ranks, target = join(), open_target("demo", device="cpu")
calls = []

def run(ids, states=None):
    calls.append(ids.numel())
    return target.run(ids, states=states)

model = HarnessModel(run, *target.encoder(), target.device, batch=3, longest=64, ranks=ranks)
texts = [text[:40 + 37 * i] for i, text in enumerate(read_texts(evaluation_file())[:10])]
stop = {"until": ["."], "max_gen_toks": 5}

def ask(kind, rows):
    given = [Instance(kind, {}, row, i) for i, row in enumerate(rows)]
    return getattr(model, kind)(given)

found = [
    ask("loglikelihood", [(text[:-9], text[-9:]) for text in texts]),
    ask("loglikelihood_rolling", [(text,) for text in texts]),
    ask("generate_until", [(text, stop) for text in texts[:7]]),
]
work = sum(calls)
try:
    ask("loglikelihood", [("a", f" {ranks.number}")])
except RankError as error:
    found.append(str(error))
print(json.dumps([found, work]))
"""


def test_processes_share_the_batches_and_have_what_one_has() -> None:
    alone, *together = (json.loads(out) for out in ended([*start(1, SHARED), *start(2, SHARED)]))
    for found, work in together:
        assert found == [*alone[0], "the processes of this run have different documents of a task"]
        assert 0.4 < work / alone[1] < 0.6


def test_a_text_begins_with_what_the_tokenizer_puts_before_it() -> None:
    from tiny import EOS, tokenizer
    from tokenizers.processors import TemplateProcessing

    plain, marked = tokenizer(), tokenizer()
    marked.post_processor = TemplateProcessing(single="w9 $A", special_tokens=[("w9", 9)])
    assert HarnessModel(None, plain, EOS).prefix_token_id == EOS
    model = HarnessModel(None, marked, EOS)
    assert model.prefix_token_id == 9
    assert model.tok_encode("w1 w2") == [9, 1, 2]
    assert model.tok_encode("w9 w2") == [9, 2]  # begins so already
    assert model.tok_encode("w1", add_special_tokens=False) == [1]
