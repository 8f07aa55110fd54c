"""Lets the registries' torchvision, which links CUDA, be imported beside a CPU build of torch.

Installed next to a `.pth` file that imports it at every Python start, so it must not import torch itself:
the two operators torchvision registers fakes for are declared right before its first import. Only their
schemas are declared; calling them still fails, while transforms and model definitions work.
"""

import sys


class _BeforeTorchvision:
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            type(self).library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
