"""The tasks of published figures, from lm-eval's registry, on made-up documents of their form."""

from __future__ import annotations

from typing import Any

import pytest

from ssmc.cli.target import open_target
from ssmc.demo import model_folder

pytest.importorskip("lm_eval", reason="needs lm-eval: make test-eval")
pytest.importorskip("accelerate", reason="lm-eval needs accelerate to run transformers")

import datasets

from ssmc.evaluate.harness import HarnessModel
from ssmc.evaluate.scores import Score, find_tasks, score

DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "lambada_openai": [
        {"text": "In the beginning God created the heavens and the earth and saw the earth"},
        {"text": "He said to them that they should go to the house and they came to the house"},
    ],
    "hellaswag": [
        {"ctx_a": "A man walks in.", "ctx_b": "he", "activity_label": "Walking",
         "endings": ["sits down.", "is a lake of fire.", "of of of.", "has risen."], "label": "0"},
        {"ctx_a": "The king spoke.", "ctx_b": "the people", "activity_label": "Speaking",
         "endings": ["[title] heard.", "run a database.", "went.", "were glad."], "label": "3"},
    ],
    "piqa": [
        {"goal": "Open a file", "sol1": "Use open().", "sol2": "Use the sea.", "label": 0},
        {"goal": "Go up", "sol1": "Fall down.", "sol2": "Take the way up.", "label": 1},
    ],
    "ai2_arc": [
        {"question": "What is the earth?", "answerKey": "B",
         "choices": {"text": ["a star", "a planet", "a king"], "label": ["A", "B", "C"]}},
        {"question": "Who reigns?", "answerKey": "C",
         "choices": {"text": ["a star", "a planet", "a king"], "label": ["A", "B", "C"]}},
    ],
    "winogrande": [
        {"sentence": "Moses spoke to Aaron because _ was near.", "option1": "Moses",
         "option2": "Aaron", "answer": "2"},
        {"sentence": "Ruth gave Naomi bread because _ was hungry.", "option1": "Ruth",
         "option2": "Naomi", "answer": "2"},
    ],
    "wikitext_document_level": [
        {"page": " = King = \n A king , the 1 @.@ 5 th , ruled . He 's gone . \n"},
        {"page": " = Sea = \n The sea is large ; \" it \" has fish . \n"},
    ],
}  # fmt: skip
TASKS = ("lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande",
         "wikitext")  # fmt: skip


def load(path: str, **_: Any) -> datasets.DatasetDict:
    rows = datasets.Dataset.from_list(DOCUMENTS[path.rpartition("/")[2]])
    return datasets.DatasetDict(train=rows, validation=rows, test=rows)


@pytest.mark.slow
def test_they_score_as_with_the_model_for_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: load(path))
    tasks = find_tasks(TASKS)
    target = open_target("demo", device="cpu")
    ours = score(HarnessModel(target.run, *target.encoder(), target.device), tasks)
    theirs: list[Score] = score(
        HFLM(pretrained=str(model_folder()), device="cpu", dtype="float32", max_length=2048),
        tasks,  # type: ignore[arg-type]
    )
    assert {s.task for s in ours} == set(TASKS)
    assert [(s.task, s.metric, s.each is None) for s in ours] == [
        (s.task, s.metric, s.each is None) for s in theirs
    ]
    assert [s.value for s in ours] == pytest.approx([s.value for s in theirs], rel=1e-4)
    means = {s.task: s.documents for s in ours if s.metric == "acc"}
    assert means == {name: 2 for name in TASKS if name != "wikitext"}
