"""Declares the two operators whose schemas torchvision's Python half needs, just before torchvision is imported.

The torchvision wheel is a CUDA build: its library does not load beside a CPU build of torch, so its operators stay
undeclared and `import torchvision` fails. SGLang imports torchvision for image models; text models never call it.
Only schemas are declared: calling an operator still fails. Loaded by ``torchvision_schemas.pth`` at interpreter start.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DeclareFirst(MetaPathFinder):
    """Sees the first import of torchvision, declares the schemas, and steps aside."""

    library: object = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            library = torch.library.Library("torchvision", "DEF")
            for schema in _SCHEMAS:
                library.define(schema)
            type(self).library = library  # dropping it would take the schemas back
        return PathFinder.find_spec(fullname, path, target)


sys.meta_path.insert(0, _DeclareFirst())
