"""Images of noise, for benchmarks: nothing is read from disk."""

import numpy as np
from PIL import Image

from swin_moe.config import DataConfig
from swin_moe.randomness import derive_key


class Synthetic:
    """Uniform noise of the model's image size, a pure function of (split, index): for benchmarks only."""

    NUM_VAL = 1000

    def __init__(self, config: DataConfig, split: str, *, img_size: tuple[int, int], num_classes: int) -> None:
        self._length = config.synthetic_samples if split == "train" else min(self.NUM_VAL, config.synthetic_samples)
        self._stream = 0 if split == "train" else 1
        self._img_size = img_size
        self.num_classes = num_classes
        self.classes = tuple(str(label) for label in range(num_classes))

    def __len__(self) -> int:
        return self._length

    def path(self, index: int) -> str:
        """Returns a name for messages."""
        return f"synthetic[{index}]"

    def sample(self, index: int) -> tuple[Image.Image, int]:
        """Returns (RGB image, label)."""
        key = derive_key(self._stream, index)
        height, width = self._img_size
        words = np.random.Philox(key).random_raw(-(-height * width * 3 // 8))
        pixels = words.view(np.uint8)[: height * width * 3].reshape(height, width, 3)
        return Image.fromarray(pixels), key % self.num_classes

    def labels(self) -> np.ndarray:
        """Returns (N,) the label of every image."""
        return np.asarray([derive_key(self._stream, index) % self.num_classes for index in range(self._length)])
