"""A compiled model as transformers sees a causal language model."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ssmc.errors import UsageError
from ssmc.runtime import CompiledModel, Session, load
from ssmc.runtime.padding import real_tokens


class SessionCache:
    """What `past_key_values` is: a session, whose states every call overwrites.

    It is lent for as long as the cache lives, and reused afterwards with its recordings.
    """

    is_compileable = False

    def __init__(self, model: CompiledModel, batch: int) -> None:
        stack = contextlib.ExitStack()
        self.session: Session = stack.enter_context(model.lend_session(batch))
        self.tokens = 0
        weakref.finalize(self, stack.close)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that it has had, padding among them."""
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each sequence go on from another's states."""
        self.session.reorder(beam_idx)


class CompiledForCausalLM(PreTrainedModel, GenerationMixin):
    """What `AutoModelForCausalLM.from_pretrained` returns for a folder that ssmc exported.

    It has no parameters: the tensors are the graph's. Results are float32.
    """

    compiled: CompiledModel

    def read(self, folder: Path, device: str) -> None:
        """Take the artefact in `folder`, onto a device."""
        self._take(load(folder, device=device))

    def _take(self, compiled: CompiledModel) -> None:
        self.__dict__["compiled"] = compiled  # no submodule: it moves as a whole

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.compiled.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes one of its own

    def get_input_embeddings(self) -> nn.Module | None:
        """None: the embedding is a tensor of the graph."""
        return None

    def get_output_embeddings(self) -> nn.Module | None:
        """None, likewise."""
        return None

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the tensors."""
        return self.compiled.weight_bytes()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Elements of the tensors, packed ones as they are packed; none is trainable."""
        return (
            0 if only_trainable else sum(t.numel() for t in self.compiled.graph.params().values())
        )

    def save_pretrained(self, save_directory: str | Path, **given: Any) -> None:
        """Write the folder again, whole or not at all."""
        from ssmc.export.huggingface import export

        export(self.compiled.artefact, Path(save_directory), force=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledForCausalLM:
        """Move to where `fn` moves tensors to; raises TypeError where it changes their dtype."""
        moved = fn(torch.empty(0, device=self.device))
        if moved.dtype != torch.float32:
            raise TypeError(
                f"a compiled model cannot be cast to {moved.dtype}: its numbers are integers and "
                "float32, as it was compiled; leave the dtype out"
            )
        if moved.device != self.device:
            self._take(CompiledModel(self.compiled.artefact, device=moved.device))
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SessionCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **given: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [batch, length, vocabulary] of `input_ids` [batch, length].

        `attention_mask` [batch, all tokens so far] is 0 where a row is padded: padding is not run,
        so a row gives what it gives alone, and zeros where it is padded. `logits_to_keep` is how
        many of the last positions are wanted (0: all). Raises TypeError for arguments that a
        compiled model cannot serve, UsageError for a mask with holes.
        """
        _refuse(given)
        if input_ids is None:
            raise TypeError("a compiled model reads input_ids: it has no inputs_embeds")
        if past_key_values is not None and not isinstance(past_key_values, SessionCache):
            raise TypeError(
                f"past_key_values is {type(past_key_values).__name__}, not what this model returned"
            )
        kept = use_cache if use_cache is not None else getattr(self.config, "use_cache", True)
        cache = past_key_values or SessionCache(self.compiled, len(input_ids))
        logits = self._logits(cache, input_ids, attention_mask, logits_to_keep)
        cache.tokens += input_ids.shape[1]
        loss = (
            None
            if labels is None
            else self.loss_function(
                logits=logits, labels=labels.to(logits.device), vocab_size=logits.shape[-1]
            )
        )
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache if kept else None
        )
        return result if return_dict is not False else result.to_tuple()

    def _logits(self, cache: SessionCache, ids: Tensor, mask: Tensor | None, keep: int) -> Tensor:
        rows = None if mask is None else real_tokens(mask[:, -ids.shape[1] :], ids)
        session = cache.session
        if rows is None:
            if keep == 1:
                return session.prefill(ids)[:, None].clone()  # its buffer is the next call's
            return session.score(ids)[:, -keep:]
        if cache.tokens:
            raise UsageError("attention_mask has zeros behind tokens that were run already")
        prompts = [row[start:end] for row, (start, end) in zip(ids, rows, strict=True)]
        if keep == 1 and all(end == ids.shape[1] for _, end in rows):
            return session.prefill_each(prompts)[:, None]
        scored = session.score_each(prompts)
        logits = scored[0].new_zeros((*ids.shape, scored[0].shape[-1]))
        for row, (start, end), found in zip(logits, rows, scored, strict=True):
            row[start:end] = found
        return logits[:, -keep:]


_IGNORED = {
    "position_ids", "cache_position",  # which the states know
    "tokenizer",  # with which `generate` looks for stop strings, and which it passes on
}  # fmt: skip


def _refuse(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name not in _IGNORED and value is not None and value is not False:
            raise TypeError(f"a compiled model has no argument {name}={value!r}")


def become_compiled(model: Any) -> None:
    """Turn a model of transformers, built without weights, into a CompiledForCausalLM.

    Its class keeps the name, by which pipelines know what a model can do.
    """
    original = type(model)
    for held in (model._modules, model._parameters, model._buffers):
        held.clear()
    model.__class__ = type(
        original.__name__,
        (CompiledForCausalLM,),
        {"__module__": __name__, "__doc__": CompiledForCausalLM.__doc__,
         "config_class": original.config_class},
    )  # fmt: skip
    model.all_tied_weights_keys = {}
    model._keys_to_ignore_on_load_unexpected = {"."}  # all: ssmc reads them itself
