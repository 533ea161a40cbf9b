"""Detectors of named things in pictures: OWL-ViT, from a folder of transformers' own format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ModelError


class OwlViT:
    """OWL-ViT (Minderer et al. 2022), the detector of EditVal's judge. Raises ModelError where there is none."""

    def __init__(self, place: str | Path) -> None:
        from transformers import OwlViTForObjectDetection, OwlViTProcessor

        try:
            self.model = OwlViTForObjectDetection.from_pretrained(place, local_files_only=True).eval()
            self.processor: Any = OwlViTProcessor.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError) as error:
            what = str(error).splitlines()[0]
            raise ModelError(f"the detector {place}", what, "a folder with an OWL-ViT of transformers") from None

    def detect(
        self, image: NDArray[np.uint8], names: Sequence[str]
    ) -> list[tuple[str, float, tuple[float, float, float, float]]]:
        """(name, score, (left, top, right, bottom) in pixels), best first; ``image`` uint8 [y, x, rgb]."""
        inputs = self.processor(text=[list(names)], images=image, return_tensors="pt")
        with torch.no_grad():
            outputs = self.model(**inputs)
        found = self.processor.post_process_grounded_object_detection(
            outputs, threshold=0.0, target_sizes=torch.tensor([image.shape[:2]])
        )[0]
        rows = sorted(zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), strict=True),
                      reverse=True)  # fmt: skip
        return [(names[label], score, (box[0], box[1], box[2], box[3])) for score, label, box in rows]
