"""Every touch of transformers' internals: configurations, classes, loading, and the forward.

transformers is imported when first needed; `import ssmc` stays fast without it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmc.errors import UnsupportedError, UsageError, did_you_mean

TESTED = ((5, 17), (5, 23))
_NEEDED = ("AutoConfig", "AutoModelForCausalLM", "MambaConfig", "Mamba2Config")
_SUPPORTED = (
    "supported are mamba, mamba2, falcon_mamba, jamba, llama and their like (docs/models.md)"
)
_log = logging.getLogger("ssmc")


@functools.cache
def library() -> Any:
    """The transformers module.

    Warns about a version outside the tested range; raises UnsupportedError where the names used
    here are missing.
    """
    import transformers

    missing = [name for name in _NEEDED if not hasattr(transformers, name)]
    low, high = (".".join(map(str, version)) for version in TESTED)
    hint = f"install transformers {low} to {high}"
    version = transformers.__version__
    if missing:
        raise UnsupportedError(f"transformers {version} has no {', '.join(missing)}", hint=hint)
    if not TESTED[0] <= _release(version) <= TESTED[1]:
        _log.warning("transformers %s is not tested with ssmc; %s", version, hint)
    return transformers


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def config(raw: Mapping[str, Any], name: str) -> Any:
    """The configuration object of a config.json.

    `name` is the folder's, for messages. Raises UnsupportedError for a model type transformers
    does not know or weights already quantised, UsageError for values it rejects.
    """
    from huggingface_hub.errors import StrictDataclassError

    values = _decoded(dict(raw))
    if "quantization_config" in values:
        raise UnsupportedError(
            f"{name}: the checkpoint is already quantised",
            hint="give the 16-bit checkpoint it was made from",
        )
    kind = str(values.pop("model_type", None))
    auto = library().AutoConfig
    known = library().models.auto.configuration_auto.CONFIG_MAPPING
    if kind not in known:
        raise UnsupportedError(
            f"{name}: model type '{kind}' is not known to transformers {library().__version__}",
            hint=did_you_mean(kind, known) or _SUPPORTED,
        )
    try:
        with _quiet():
            return auto.for_model(kind, **values)
    except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{name}/config.json: {reason}", hint="correct the value") from error


def _decoded(value: Any) -> Any:
    """JSON with transformers' spelling of infinity, {"__float__": "Infinity"}, as a float."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    return {key: _decoded(item) for key, item in value.items()}


def skeleton(config: Any) -> nn.Module:
    """The causal language model of a configuration, on the meta device: structure, no weights.

    Raises UnsupportedError where transformers has no causal language model for it.
    """
    try:
        with torch.device("meta"), _quiet():
            return library().AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UnsupportedError(
            f"transformers has no causal language model for '{config.model_type}'",
            hint=_SUPPORTED,
        ) from error


def untrained(config: Any, device: torch.device | str) -> nn.Module:
    """The causal language model of a configuration on `device`, with weights drawn at random."""
    with torch.device(device), _quiet():
        module: nn.Module = library().AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return module.eval()


def load(
    skeleton: Any,
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A skeleton's model in `dtype` and evaluation mode, from the folder's safetensors.

    Weights that have it already are those of the file, mapped. `tensors` replaces the files.
    Raises UsageError naming tensors that are missing, unexpected or of another shape.
    """
    with _quiet():
        module, report = type(skeleton).from_pretrained(
            folder if tensors is None else None,
            state_dict=tensors,
            config=skeleton.config,
            use_safetensors=True,
            dtype=dtype,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_report(report, folder)
    return module.eval()


def _check_report(report: Mapping[str, Any], folder: Path) -> None:
    shapes = [f"{n} is {list(a)}, expected {list(b)}" for n, a, b in report["mismatched_keys"]]
    problems = {
        "tensors missing": sorted(report["missing_keys"]),
        "tensors of another architecture": sorted(report["unexpected_keys"]),
        "tensors of another shape": sorted(shapes),
    }
    for problem, found in problems.items():
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UsageError(
                f"{folder}: {problem}: {', '.join(found[:3])}{more}",
                hint="the weights and config.json do not belong together; download both again",
            )


def is_causal_lm(module: nn.Module) -> bool:
    """Whether `module` is a language model of transformers."""
    if "transformers" not in sys.modules:
        return False
    return isinstance(module, library().PreTrainedModel) and module.can_generate()


def described(module: nn.Module) -> dict[str, Any] | None:
    """The configuration of a language model of transformers as JSON data; None for other modules.

    Read back by `config`, it gives the architecture again.
    """
    if not is_causal_lm(module):
        return None
    config: Any = module.config
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version", "dtype"):
        values.pop(name, None)
    return values | {"architectures": [type(module).__name__]}


def logits(module: nn.Module, input_ids: Any) -> Any:
    """The logits [B, L, V] of a causal language model for token ids [B, L].

    Where the model would make positions and masks of the length, which adapters need none of, it is
    handed something as if they were made: a mask of four dimensions is passed on as it is. Neither
    can be taken for the real thing.
    """
    given: dict[str, Any] = {"use_cache": False, "return_dict": True}
    if "position_ids" in inspect.signature(module.forward).parameters:
        given["position_ids"] = _Positions()
        given["attention_mask"] = torch.full((1, 1, 1, 1), torch.nan)
    return module(input_ids=input_ids, **given).logits


class _Positions:
    """In the place of positions, which adapters know; other code that wants them is refused."""

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(
            "the positions of tokens, for something else than rotary embeddings",
            hint="register an adapter that takes the state 'position'",
        )


def eos_token_id(module: Any) -> int | list[int] | None:
    """The end-of-text token, or tokens, of a model's configuration."""
    return module.config.eos_token_id


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither the library's reports nor its progress bars: failures are raised with our words."""
    messages = library().utils.logging
    verbosity, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity(messages.CRITICAL)
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
        if bars:
            messages.enable_progress_bar()
