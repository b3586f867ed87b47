"""Perplexity of models in llama.cpp, exported by `ssmc export --format gguf`, beside ssmc's own.

    python tools/perplexity_llama_cpp.py ../models/mamba-5m --passes 'hadamard{residual=true}'

Each model, a Hugging Face folder, is compiled in float with the passes named and exported in each
of --types; llama.cpp (tools/llama_cpp_build.py) reads the same windows of a text, with keys and
values in float32. Its tokenizer reads the text as well, document by document. Behind a perplexity
is its difference from that of ssmc.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_cpp_build import LlamaCpp, build_llama_cpp

if TYPE_CHECKING:
    from torch import Tensor

    from ssmc.runtime import CompiledModel

LENGTH = 512


@dataclass(frozen=True)
class Text:
    """Documents, and what the model's tokenizer makes of them: windows [n, LENGTH]."""

    documents: list[str]
    windows: Tensor


def main() -> None:
    """Build, compile, export, compare, print."""
    arguments = _arguments()
    if arguments.measure:
        file, text = arguments.measure
        print(json.dumps(_measure(file, text, arguments.threads)))
        return
    built = build_llama_cpp(arguments.build)
    headings = ["model", "ssmc", *(f"llama.cpp {kind}" for kind in arguments.types), "documents"]
    print(("{:16}" + "{:>20}" * (len(headings) - 1)).format(*headings))
    for model in arguments.models:
        cells = [f"{cell:>20}" for cell in _compare(model, built, arguments)]
        print(f"{Path(model).name:16}", *cells, sep="", flush=True)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--types", nargs="+", default=["f32", "q8_0"], help="f32, f16, q8_0")
    parser.add_argument("--passes", default="", help="folded into the weights (none)")
    parser.add_argument("--text", type=Path, help="documents (the embedded)")
    parser.add_argument("--windows", type=int, default=16, help=f"of {LENGTH} tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--build", type=Path, default=Path("build/llama.cpp"))
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _compare(model: str, built: LlamaCpp, arguments: Any) -> list[str]:
    """Perplexities, theirs with the difference, and how many documents have other tokens."""
    import ssmc
    from ssmc.export import export

    folder = built.folder / "models" / f"{Path(model).name}-float"
    compiled = ssmc.compile(model, passes=arguments.passes, scheme="none", samples=2, length=64)
    compiled.save(folder, force=True)
    text = cut(compiled, arguments.text, arguments.windows)
    ours = our_perplexity(compiled, text)
    cells, other = [f"{ours:.4f}"], 0
    for kind in arguments.types:
        file = export(folder, None, "gguf", type=kind, force=True).out
        theirs, tokens = their_reading(built, file, text, arguments.threads)
        cells.append(f"{theirs:.4f} ({theirs / ours - 1:+.4%})")
        other = _differing(compiled, text, tokens)
    return [*cells, f"{other} of {len(text.documents)} differ"]


def cut(model: CompiledModel, path: Path | None, count: int) -> Text:
    """The first windows of a text (None: the embedded), and its documents."""
    from ssmc.corpus import read_texts, token_windows
    from ssmc.demo import evaluation_file

    assert model.tokenizer is not None
    path = path or evaluation_file()
    documents = read_texts(path)
    windows = token_windows(model.tokenizer, documents, model.about["eos"], LENGTH, str(path))
    return Text(documents, windows[:count])


def our_perplexity(model: CompiledModel, text: Text) -> float:
    """Perplexity of a compiled model."""
    from ssmc.evaluate.perplexity import perplexity

    return perplexity(model, text.windows).perplexity


def their_reading(
    built: LlamaCpp, file: Path, text: Text, threads: int
) -> tuple[float, list[list[int]]]:
    """Perplexity of a GGUF file in llama.cpp, and the tokens of each document."""
    given = file.with_suffix(".json")
    given.write_text(json.dumps({"windows": text.windows.tolist(), "documents": text.documents}))
    output = built.python(__file__, "--measure", file, given, "--threads", str(threads))
    found = json.loads(output)
    return found["perplexity"], found["tokens"]


def _differing(model: CompiledModel, text: Text, tokens: list[list[int]]) -> int:
    assert model.tokenizer is not None
    ours = (model.tokenizer.encode(document).ids for document in text.documents)
    return sum(mine != theirs for mine, theirs in zip(ours, tokens, strict=True))


def _measure(file: Path, text: Path, threads: int) -> dict[str, Any]:
    """What llama.cpp makes of a text; runs in the Python of the build, without torch."""
    import llama_cpp
    import numpy as np

    given = json.loads(text.read_text())
    sizes = {"n_ctx": LENGTH, "n_batch": LENGTH, "n_threads": threads, "n_threads_batch": threads}
    float32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(str(file), logits_all=True, verbose=False, **sizes, **float32)
    losses = []
    for window in given["windows"]:
        model.reset()
        model.eval(window[:-1])
        logits = np.array(model.scores[: len(window) - 1], np.float64)
        logits -= logits.max(1, keepdims=True)
        scored = logits[np.arange(len(logits)), window[1:]]
        losses.append(np.log(np.exp(logits).sum(1)) - scored)
    tokens = [model.tokenize(document.encode()) for document in given["documents"]]
    return {"perplexity": float(np.exp(np.mean(losses))), "tokens": tokens}


if __name__ == "__main__":
    main()
