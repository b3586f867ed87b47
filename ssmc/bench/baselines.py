"""What a compiled model is compared with: mamba-ssm's own model, and the transformers one."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from ssmc.bench.sizes import VOCABULARY, Size
from ssmc.bench.subjects import Runner
from ssmc.errors import DeviceError, UsageError, choices

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
WARM_UP = 3  # calls before one is recorded: Triton compiles and tunes its kernels in the first


def find_dtype(name: str | None, size: Size | None, device: torch.device) -> torch.dtype:
    """The dtype called `name`; None: what a size is published in, float32 on a CPU."""
    if name is not None:
        if name not in DTYPES:
            raise UsageError(f"unknown dtype '{name}'", hint=choices(name, DTYPES))
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    mamba2 = size is not None and size.layer == "Mamba2"
    return torch.bfloat16 if mamba2 else torch.float16


def _called(library: str, dtype: torch.dtype) -> str:
    return f"{library} {str(dtype).removeprefix('torch.')}"


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


class MambaSsm:
    """`MambaLMHeadModel` of mamba-ssm with random weights, recorded as CUDA graphs.

    Decoding is recorded as in mamba_ssm.utils.generation; so is prefill, which that library runs
    kernel by kernel. Raises DeviceError where mamba-ssm or a CUDA device is missing.
    """

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        library, config = mamba_ssm(device)
        self.name, self.vocabulary = _called("mamba-ssm", dtype), VOCABULARY
        settings = config(**size.config(), fused_add_norm=True)
        self.model = library(settings, device=device, dtype=dtype).eval()
        self.weight_bytes = _bytes(self.model)
        self.device, self.dtype = device, dtype

    def open(self, batch: int) -> Runner:
        """Caches of `batch` sequences."""
        return _MambaSsmRunner(self, batch)


def mamba_ssm(device: torch.device) -> tuple[Any, Any]:
    """The classes of its model and of its configuration; DeviceError where it cannot run."""
    if device.type != "cuda":
        raise DeviceError(
            "mamba-ssm runs on a CUDA device only", hint="--baseline hf runs anywhere"
        )
    if importlib.util.find_spec("mamba_ssm") is None:
        raise DeviceError(
            "the baseline needs mamba-ssm, which is not installed",
            hint="pip install --no-build-isolation 'mamba-ssm>=2.3' 'causal-conv1d>=1.6'",
        )
    model = importlib.import_module("mamba_ssm.models.mixer_seq_simple").MambaLMHeadModel
    return model, importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig


class _MambaSsmRunner:
    def __init__(self, subject: MambaSsm, batch: int) -> None:
        generation = importlib.import_module("mamba_ssm.utils.generation")
        caches = subject.model.allocate_inference_cache(batch, 1, dtype=subject.dtype)
        self.past = generation.InferenceParams(
            max_seqlen=1, max_batch_size=batch, key_value_memory_dict=caches
        )
        self.model, self.device = subject.model, subject.device
        self.pool = torch.cuda.graph_pool_handle()
        self.recorded: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def prefill(self, ids: Tensor) -> Tensor:
        """The prompt from empty states; it writes the caches whole, so they need no reset."""
        return self._replay(ids, first=True)

    def step(self, ids: Tensor) -> Tensor:
        """One token, the caches updated in place."""
        return self._replay(ids, first=False)

    def reset(self) -> None:
        """Nothing: prefill starts from empty states in any case."""

    def _replay(self, ids: Tensor, *, first: bool) -> Tensor:
        key = (ids.shape[1], first)
        if key not in self.recorded:
            self.recorded[key] = self._record(ids, first)
        graph, given, logits = self.recorded[key]
        given.copy_(ids)
        graph.replay()
        return logits

    @torch.no_grad()
    def _record(self, ids: Tensor, first: bool) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = ids.clone()
        caches = [cache for pair in self.past.key_value_memory_dict.values() for cache in pair]
        before = [cache.clone() for cache in caches]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._run(given, first)
        torch.cuda.current_stream().wait_stream(stream)
        torch._foreach_copy_(caches, before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self._run(given, first)
        return graph, given, logits

    def _run(self, ids: Tensor, first: bool) -> Tensor:
        self.past.seqlen_offset = 0 if first else 1  # above 0 the model steps
        out: Tensor = self.model(ids, inference_params=self.past, num_last_tokens=1).logits
        return out[:, -1]


class Transformers:
    """A transformers model, run eagerly with its own cache."""

    def __init__(self, module: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.vocabulary = _called("transformers", dtype), module.config.vocab_size
        self.module = module.to(device, dtype).eval()
        self.weight_bytes = _bytes(self.module)

    def open(self, batch: int) -> Runner:
        """A cache; it takes any batch."""
        return _TransformersRunner(self.module)


class _TransformersRunner:
    def __init__(self, module: Any) -> None:
        self.module = module
        self.past: dict[str, Any] = {}

    def prefill(self, ids: Tensor) -> Tensor:
        """The prompt, with a new cache."""
        self.reset()
        return self.step(ids)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """The next tokens."""
        out = self.module(input_ids=ids, use_cache=True, logits_to_keep=1, **self.past)
        self.past = {"cache_params": out.cache_params}
        logits: Tensor = out.logits[:, -1]
        return logits

    def reset(self) -> None:
        """Forget the cache."""
        self.past = {}
