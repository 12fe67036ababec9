"""A task from elsewhere that finds what is bright in an image: for tests of what draws and stores findings."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from swin_moe.data.batch import Batch
from swin_moe.data.dense.canvases import tight_box
from swin_moe.models import Network
from swin_moe.tasks.base import MicroLoss, StepContext, Task, build_encoder, micro_loss
from swin_moe.tasks.dense import Found
from swin_moe.tasks.drawing import PictureBook, pixels_of


class Bright(Task):
    """Bright pixels are class 1 of the label map, and an object of class 3 with score 0.9; the whole image is another
    one of score 0.1."""

    needs_label_maps = True

    def build_network(self) -> Network:
        return build_encoder(self.config)

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> MicroLoss:
        total = sum((p.float().square().sum() for p in model.parameters()), torch.zeros(()))
        return micro_loss(total / max(1, context.num_samples), None, len(batch["image"]), context)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], context: StepContext) -> dict[str, float]:
        book = PictureBook([str(n) for n in range(11)], count=2)
        count = 0
        for batch in batches:
            book.add(batch, self.look(model, batch, context))
            count += len(batch["image"])
        self._pictures = book.result(context.world_size)
        return {"loss": 1.0, "samples": count}

    def pictures(self) -> dict:
        return self._pictures

    def look(self, model: nn.Module, batch: Batch, context: StepContext) -> list[Found]:
        found = []
        for image, size, original in zip(batch["image"], batch["size"].tolist(), batch["original_size"].tolist()):
            pixels = torch.from_numpy(pixels_of(image[:, : size[0], : size[1]]))[..., 0].float()
            whole: Tensor = torch.nn.functional.interpolate(pixels[None, None], size=original)[0, 0]
            bright = whole > 100
            box = tight_box(bright.numpy()) or (0, 0, 1, 1)
            boxes = torch.tensor([box, (0, 0, original[1], original[0])], dtype=torch.float32)
            masks = torch.stack([bright, torch.ones_like(bright)])
            labels = torch.tensor([3, 0])
            found.append(Found(boxes, torch.tensor([0.9, 0.1]), labels, masks, bright.long()))
        return found
