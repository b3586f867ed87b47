"""From a checkpoint or a module to a graph: loading, adapters and tracing."""

from ssmc.frontend.adapters import register_adapter
from ssmc.frontend.checkpoints import Model, load_model
from ssmc.frontend.tracer import trace

__all__ = ["Model", "load_model", "register_adapter", "trace"]
