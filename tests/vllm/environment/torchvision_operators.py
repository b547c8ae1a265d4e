"""Lets a torchvision that was built for CUDA be imported beside a CPU build of torch.

Its operators are then missing, and its import fails on declaring properties of two of them. FUSION uses none, and vLLM
only imports the package. This module, loaded at start by a `.pth` file, declares the two before the first import.
"""

import sys
from importlib.abc import MetaPathFinder

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _Declarer(MetaPathFinder):
    """Finds nothing, but is asked first when torchvision is imported."""

    def find_spec(self, fullname, path, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for schema in OPERATORS:
                library.define(schema)
            self.library = library  # its declarations end with it
            sys.modules[__name__].declarer = self


sys.meta_path.insert(0, _Declarer())
