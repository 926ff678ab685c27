"""Declarations of torchvision's operators, for a torchvision that is built for another torch.

PyPI's is built for torch with CUDA. Beside a torch without, its operators are missing, and their declarations are all
that timm, lightning, peft and transformers need in order to import it.
"""

from __future__ import annotations

import torch


def declare() -> None:
    """Declare what importing torchvision misses, if it does."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        global _declarations  # they last as long as the library
        _declarations = torch.library.Library("torchvision", "DEF")
        _declarations.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declarations.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
