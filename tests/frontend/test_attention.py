"""Attention and rotary positions are matched by what they compute, whatever the class is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmc.errors import UnsupportedError
from ssmc.frontend import attention, trace
from ssmc.frontend.adapters import adapter_of
from ssmc.frontend.attention import is_attention, is_rotary

from .models import build, error, logits, tokens


def _layers() -> tuple[Any, Any]:
    """An attention and a rotary embedding of a Llama."""
    model: Any = build("llama")
    return model.model.layers[1].self_attn, model.model.rotary_emb


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_and_rotary_are_found(device: str) -> None:
    for module, forward in zip(_layers(), (attention.attention, attention.rotary), strict=True):
        adapter = adapter_of(module.to(device))
        assert adapter is not None
        assert adapter.forward is forward


def _interleaved(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels 2 i and 2 i + 1 turn together, as in GPT-J."""

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        cos, sin = (x[:, None, :, ::2].repeat_interleave(2, -1) for x in (cos, sin))
        return [
            x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin
            for x in (q, k)
        ]

    monkeypatch.setattr(f"{type(attention).__module__}.apply_rotary_pos_emb", turned)


def _window(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attention.sliding_window = 3


def _window_of_the_config(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attention.config.sliding_window = 3


def _further_tensor(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attention.sinks = nn.Parameter(torch.zeros(4))


def _no_cache(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "forward", lambda x: x)


@pytest.mark.parametrize(
    "change", [_interleaved, _window, _window_of_the_config, _further_tensor, _no_cache]
)
def test_what_computes_something_else_is_not_matched(
    change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = _layers()
    assert is_attention(module)
    change(module, monkeypatch)
    assert not is_attention(module)


def test_the_probe_leaves_the_module_as_it_was() -> None:
    module, rotary = _layers()
    module.train()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    assert is_attention(module)
    assert is_rotary(rotary)
    assert module.training
    assert "forward" not in vars(module)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_rotations_that_follow_the_length_are_refused() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedError, match="of type 'dynamic': frequencies change"):
        trace(build("llama", rope_parameters=scaling))


def test_scaled_rotations() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    model = build("llama", rope_parameters=scaling, max_position_embeddings=64)
    assert model.model.rotary_emb.attention_scaling != 1  # type: ignore[union-attr, operator]
    ids = tokens(2, 40)
    assert error(trace(model)(ids)[0], logits(model, ids)) < 1e-5


def test_positions_for_anything_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("llama")
    inner = type(model.model).forward

    def forward(*args: Any, position_ids: Any, **kwargs: Any) -> Any:
        return inner(model.model, *args, position_ids=position_ids.long(), **kwargs)

    monkeypatch.setattr(model.model, "forward", forward)
    with pytest.raises(UnsupportedError, match="the positions of tokens, for something else"):
        trace(model)
