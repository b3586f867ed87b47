"""ssmc as a quantization method of transformers: `from_pretrained` of an exported folder.

Importing this module registers it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "ssmc"


@register_quantization_config(METHOD)
class SsmcConfig(QuantizationConfigMixin):
    """The `quantization_config` of an exported folder's config.json.

    What was quantised how stands in the folder's ssmc.json and graph.json; `version` is that of
    ssmc.
    """

    def __init__(self, quant_method: str = METHOD, version: str | None = None) -> None:
        self.quant_method, self.version = quant_method, version


@register_quantizer(METHOD)
class SsmcQuantizer(HfQuantizer):
    """Puts the compiled model in the place of the layers that transformers has built.

    They are on the meta device and have no weights yet, nor do they get any: the artefact is read
    by ssmc itself, which checks it. Raises ssmc's ArtefactError for a folder that is incomplete or
    altered.
    """

    requires_calibration = True  # transformers cannot make one
    device = "cpu"

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """One device for all; raises ValueError for several."""
        if device_map is not None and len(set(device_map.values())) > 1:
            raise ValueError(
                f"a model compiled by ssmc runs on one device, not on {len(device_map)}: "
                "give device_map='cpu' or 'cuda'"
            )
        if device_map:
            self.device = str(next(iter(device_map.values())))
        return device_map

    def _process_model_before_weight_loading(
        self, model: Any, *, checkpoint_files: list[str], **given: Any
    ) -> None:
        from ssmc.integrations.model import become_compiled

        self.folder = Path(checkpoint_files[0]).parent
        if not Path(model.config._name_or_path).is_dir():
            _download(model.config._name_or_path, self.folder)
        become_compiled(model)

    def _process_model_after_weight_loading(self, model: Any, **given: Any) -> Any:
        model.read(self.folder, self.device)
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the folder again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: weights are integers."""
        return False


def _download(name: str, snapshot: Path) -> None:
    """Bring the artefact's other files beside the weights, in the Hub's cache of a repository.

    The cache has them as models--OWNER--NAME/snapshots/REVISION.
    """
    from transformers.utils import cached_file

    from ssmc.runtime.artefact import FILES

    for file in FILES:
        if not (snapshot / file).exists():
            cached_file(name, file, revision=snapshot.name, cache_dir=snapshot.parents[2])
