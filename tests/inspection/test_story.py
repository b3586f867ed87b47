"""What a story holds: moments, marks, ranges and sizes are those of the graph."""

from __future__ import annotations

from itertools import pairwise

import torch
from frontend.models import build, tokens

import ssmc
from ssmc.core import Context, is_call
from ssmc.core.dialect import operands
from ssmc.frontend import trace
from ssmc.inspection.labels import label, tensor_text
from ssmc.inspection.moments import CHANGED, GONE, KEPT, NEW, Moment
from ssmc.inspection.plots import outlier_ratio
from ssmc.inspection.sizes import by_role, sizes
from ssmc.inspection.story import Story, ranges
from ssmc.inspection.terminal import draw


def step(story: Story, name: str) -> tuple[Moment, Moment]:
    return next((s.before, s.after) for s in story.steps if s.name == name)


def test_steps_follow_one_another_to_the_result(story: Story) -> None:
    assert [s.name for s in story.steps] == [r["name"] for r in story.records]
    for earlier, later in pairwise(story.steps):
        assert later.before is earlier.after
    assert story.steps[-1].after.lines == story.moment.lines


def test_a_rotation_is_a_new_call_and_weights_that_changed(story: Story) -> None:
    before, after = step(story, "hadamard")
    marks = after.marks(before, NEW)
    mixer = "backbone_layers_3_mixer"
    assert marks[f"{mixer}_out_proj_hadamard"] == NEW
    assert marks[f"{mixer}_in_proj"] == marks[f"{mixer}_out_proj"] == CHANGED
    assert marks[f"{mixer}_conv1d"] == marks[f"{mixer}_selective_scan"] == KEPT
    changed = after.changed(after.calls[f"{mixer}_in_proj"], before)
    assert changed == ["backbone.layers.3.mixer.in_proj.weight"]


def test_what_goes_is_marked_in_the_moment_before(story: Story) -> None:
    before, after = step(story, "fold-norm")
    marks = before.marks(after, GONE)
    assert GONE in {marks[call.name] for call in before.layer(2)}
    assert GONE not in after.marks(before, NEW).values()


def test_calls_take_in_what_only_serves_them(story: Story) -> None:
    calls = story.moment.layer(0)
    assert not [c for c in calls if c.operator in ("getitem", "dequantize")]
    in_proj = next(c for c in calls if c.role == "in_proj")
    assert in_proj.tensors == (
        "backbone.layers.0.mixer.in_proj.weight_int8",
        "backbone.layers.0.mixer.in_proj.weight_scale",
    )
    assert "in_proj.weight int8 1024x256, a scale a row" in label(in_proj, story.moment).details
    (reads,) = in_proj.inputs
    assert story.moment.calls[reads].operator == "quantize_dynamic"


def test_packed_tensors_are_told_as_what_they_are() -> None:
    compiled = ssmc.compile(
        "demo", passes="quantise{weights=4,group=32,activations=16}", samples=1, length=16
    )
    name = "backbone.layers.0.mixer.in_proj.weight_int4"
    moment = Moment.of(compiled.graph)
    assert tensor_text(name, moment) == "in_proj.weight int4 1024x256, a scale 32 columns"
    size = next(s for s in sizes(moment) if s.name == name)
    assert (size.bits, size.values, size.bytes) == (4, 1024 * 256, 1024 * 128)


def test_sizes_add_up(story: Story) -> None:
    rows = by_role(story.moment)
    assert sum(r.bytes for r in rows) == sum(t.nbytes for t in story.moment.tensors.values())
    in_proj = next(r for r in rows if r.role == "in_proj")
    assert 8 < in_proj.bits < 8.2  # with the scales
    assert in_proj.tensors == 16


def test_a_rotation_spreads_the_outliers_of_out_proj(story: Story) -> None:
    for layer in range(8):
        before, after = story.before[layer], story.after[layer]
        assert before.keys() == after.keys() == {"in_proj input", "u", "y", "out_proj input"}
        assert torch.equal(before["out_proj input"], before["y"])
        assert torch.allclose(before["y"], after["y"], rtol=1e-3, atol=1e-4)
    ratios = [
        [outlier_ratio(found[layer]["out_proj input"]) for layer in range(8)]
        for found in (story.before, story.after)
    ]
    assert max(ratios[1]) < max(ratios[0]) / 2


def test_experts_are_seen_together_and_beside_a_shared_one() -> None:
    batch = (tokens(2, 17),)
    g = trace(build("granite"))
    found = ranges(g.copy(), Context([batch], batch))[1]
    named = {"expert gate_up_proj input", "expert down_proj input", "down_proj input"}
    assert named <= found.keys()
    down = [n for n in g.nodes if is_call(n, "ssmc::expert_linear") and n.meta["layer"] == 1][-1]
    seen = []
    g.watch(lambda n, value: seen.append(value) if n is operands(down)["x"] else None, *batch)
    (value,) = seen  # [B, L, experts of a token, C]
    assert torch.equal(found["expert down_proj input"], value.abs().flatten(0, 2).amax(0))


def test_a_terminal_shows_a_layer_at_any_width(story: Story) -> None:
    for width in (60, 100):
        lines = draw(story.moment, 3, width)
        assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for call in story.moment.layer(3):
        assert f"● {call.operator}" in text
    assert lines[-1].strip().startswith("╰─● add")
    assert sum(line.count("float32 512x16") for line in lines) == 1  # a detail stays whole


def test_a_bare_story_has_what_the_artefact_knows(bare_story: Story) -> None:
    assert not bare_story.steps
    assert bare_story.records
    assert bare_story.worst_layer() in bare_story.moment.layers()
