"""The formats `pt2` and `aoti`, as torch loads and runs them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from docs.blocks import ROOT, naming
from frontend.models import VOCABULARY, build, tokens
from tiny import compile_tiny
from torch import Tensor, nn
from torch._inductor import aoti_load_package
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

import ssmc
from ssmc.core import Graph
from ssmc.core.state import fresh_states
from ssmc.errors import UsageError
from ssmc.export import export
from ssmc.export.program import DESCRIPTION, MODEL, Sink

PAGE = ROOT / "docs" / "export.md"
PROMPT = "The old man and"
ROOM = 40
PARTS = ((1, (1, 1)), (3, (17, 1)), (2, (5, 9, 1)))
"""Batches, and the lengths of their calls."""


def has_compiler() -> bool:
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact with a scan, int8 caches, experts, and inputs of products in 16 bits."""
    model = build(
        "jamba", num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1,
    )  # fmt: skip
    passes = "quantise{weights=4,group=8,activations=16},kv-cache"
    compiled = ssmc.compile(model, passes=passes, calibration=tokens(4, 33))
    return compiled.save(tmp_path_factory.mktemp("hybrid") / "artefact")


@pytest.fixture(scope="module")
def demo(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(demo_folder, tmp_path_factory.mktemp("pt2") / "demo", "pt2").out


def reference(artefact: Path) -> Graph:
    """What `ssmc.load` runs, with tensors at addresses that are multiples of 64, as torch has them.

    Those of an artefact lie where they lie in its file, where a BLAS sums floats in another order.
    """
    g = ssmc.load(artefact, backend="reference", device="cpu").lowered.graph
    for tensor in g.module.buffers():
        tensor.data = tensor.data.clone()
    return g


Pair = tuple[Tensor, Tensor]


def both(
    program: Any, expected: Graph, *lengths: int, batch: int
) -> Iterator[tuple[Pair, list[Pair]]]:
    """What a program and the reference give for random tokens in parts of these lengths.

    Call by call the logits of both, and their states; each goes on from its own.
    """
    theirs = fresh_states(expected.states, batch, room=ROOM)
    mine = list(theirs.values())
    for length in lengths:
        ids = torch.randint(VOCABULARY, (batch, length))
        logits, mine = program(ids, mine)
        wanted, theirs = expected(ids, states=theirs)
        yield (logits, wanted), list(zip(mine, theirs.values(), strict=True))


def check_bits(program: Any, expected: Graph) -> None:
    for batch, lengths in PARTS:
        for logits, states in both(program, expected, *lengths, batch=batch):
            assert all(torch.equal(*pair) for pair in (logits, *states))


def test_logits_and_states_of_a_hybrid_are_those_of_the_reference(
    hybrid: Path, tmp_path: Path
) -> None:
    out = export(hybrid, tmp_path / "out", "pt2").out
    assert {"l0_ssm", "l1_k"} <= {spec.name for spec in reference(hybrid).states}
    program = torch.export.load(out / MODEL).module()
    expected = reference(hybrid)
    check_bits(program, expected)
    assert "_assert_tensor_metadata" not in program.code  # of a device: it can be moved to another
    short = list(fresh_states(expected.states, 1, room=4).values())
    with pytest.raises(UsageError, match="a cache of 4 tokens has no room for 5"):
        program(torch.ones(1, 5, dtype=torch.int64), short)


def test_states_that_are_rounded_by_chance_are_those_of_the_reference(tmp_path: Path) -> None:
    passes = "hadamard,percentile,state{bits=8,rounding=stochastic}"
    artefact = compile_tiny("mamba2", passes).save(tmp_path / "artefact")
    out = export(artefact, tmp_path / "out", "pt2").out
    check_bits(torch.export.load(out / MODEL).module(), reference(artefact))


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_a_compiled_package_gives_the_logits_of_the_reference(hybrid: Path, tmp_path: Path) -> None:
    """What Inductor compiles is right to a few units of float32.

    That can turn a value between two integers, or two numbers of 16 bits, into the other one, which
    is at most 2^-7 of it away, in few tokens. Without the rounding to 16 bits all would be off, by
    some 2^-10.
    """
    with inductor.patch("cpp.vec_isa_ok", False):  # which takes programs that try the processor
        out = export(hybrid, tmp_path / "out", "aoti").out
    program, expected = aoti_load_package(str(out / MODEL)), reference(hybrid)
    together, _ = next(both(program, expected, 1, batch=64))
    assert error(*together).median() < 2**-12
    for batch, lengths in PARTS:
        for (logits, wanted), _ in both(program, expected, *lengths, batch=batch):
            assert error(logits, wanted).max() < 2**-7
            assert torch.equal(logits.argmax(-1), wanted.argmax(-1))


def error(actual: Tensor, expected: Tensor) -> Tensor:
    """Of each token's logits, relative to their norm: [B, L]."""
    return (actual - expected).norm(dim=-1) / expected.norm(dim=-1)


# What `ssmc.ops` does not import itself is refused.
ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path, target=None):
        package, _, inside = name.partition(".")
        if package == "ssmc" and inside.split(".")[0] not in ("", "ops", "quant", "errors"):
            raise ModuleNotFoundError(f"{name} is refused", name=name)

sys.meta_path.insert(0, Refuse())
exec(open(sys.argv[1]).read())
torch.save(logits, "logits")
assert not {"transformers", "safetensors", "numba"} & sys.modules.keys()
"""


def test_the_example_of_the_docs_runs_with_torch_and_the_operators_alone(
    demo: Path, demo_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "example.py").write_text(naming(PAGE, "demo-pt2").text)
    (tmp_path / "demo-pt2").symlink_to(demo)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "example.py"], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compiled = ssmc.load(demo_folder, "reference", "cpu")
    assert compiled.tokenizer is not None
    ids = torch.tensor([compiled.tokenizer.encode(PROMPT).ids])
    expected = compiled.generate(ids, 12, eos_token_id=-1)
    assert done.stdout == f"{compiled.tokenizer.decode(expected[0].tolist())}\n"
    logits, _ = compiled(expected[:, :-1])
    assert torch.equal(torch.load(tmp_path / "logits"), logits[:, -1:])


def test_a_file_says_nothing_of_the_machine_and_has_no_pickled_tensor(
    demo: Path, demo_folder: Path, tmp_path: Path
) -> None:
    assert {path.name for path in demo.iterdir()} == {MODEL, DESCRIPTION, "tokenizer.json"}
    with zipfile.ZipFile(demo / MODEL) as file:
        contents = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    assert str(ROOT).encode() not in contents["models/model.json"]
    weights = json.loads(contents["data/weights/model_weights_config.json"])["config"]
    assert not any(entry["use_pickle"] for entry in weights.values())
    assert len(contents["data/sample_inputs/model.pt"]) < 2000  # where torch says there are none
    again = export(demo_folder, tmp_path / "again", "pt2").out
    assert (again / MODEL).read_bytes() == (demo / MODEL).read_bytes()


class Scan(nn.Module):
    """A layer with a scan whose step sizes have no bound."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.A = nn.Parameter(-torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.proj(x).unflatten(2, (2, 4))
        shared = heads[:, :, :1]
        return ssmc.ops.ssd_scan(heads, heads[..., 0], self.A, shared, shared)[0]


def test_a_module_of_ones_own_has_no_infinity_that_inductor_could_not_read(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 8)
    compiled = ssmc.compile(Scan(), x, calibration=torch.randn(4, 5, 8))
    compiled.save(tmp_path / "scan")
    program = torch.export.load(export(tmp_path / "scan", tmp_path / "out", "pt2").out / MODEL)
    assert any(math.inf in node.args for node in compiled.lowered.graph.nodes)
    assert not any(math.inf in node.args for node in program.graph.nodes)
    assert torch.equal(program.module()(x, [])[0], reference(tmp_path / "scan")(x)[0])


class Twice(nn.Module):
    """A layer with an operator of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.proj(torch.ops.another.twice(x))


def test_what_is_not_of_any_length_is_refused(tmp_path: Path) -> None:
    library = torch.library.Library("another", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "another::twice", lambda x: x.new_empty(x.shape if x.shape[1] > 3 else ()), lib=library
    )
    ssmc.allow_operators("another")
    made = ssmc.compile(Twice(), torch.randn(2, 5, 8), calibration=torch.randn(4, 5, 8))
    made.save(tmp_path / "twice")
    with pytest.raises(UsageError, match=r"torch\.export cannot express this artefact: .*length"):
        export(tmp_path / "twice", tmp_path / "out", "pt2")
    assert not (tmp_path / "out").exists()


def test_a_missing_compiler_is_named(tiny_artefact: Path, tmp_path: Path) -> None:
    with (
        inductor.patch("cpp.cxx", ("no-such-compiler",)),
        pytest.raises(UsageError, match=r"there is no C\+\+ compiler"),
    ):
        export(tiny_artefact, tmp_path / "out", "aoti")
    assert not (tmp_path / "out").exists()


def test_an_archive_on_a_full_disk_is_an_error(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    program = torch.export.export(nn.Linear(300, 300), (torch.zeros(1, 300),))
    with pytest.raises(OSError, match="No space left"), Sink(full) as file:
        torch.export.save(program, file)
    with Sink(tmp_path / MODEL) as file:
        torch.export.save(program, file)
    assert torch.equal(
        torch.export.load(tmp_path / MODEL).state_dict["weight"], program.state_dict["weight"]
    )
