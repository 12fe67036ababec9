"""The detector that ours is timed against computes what ours computes."""

from contextlib import nullcontext
from dataclasses import replace

import plain_detector as plain
import torch

from swin_moe.config.io import load_config
from swin_moe.data.loader import TrainLoader
from swin_moe.models.detection.heads.mask_head import paste_masks
from swin_moe.tasks.base import StepContext
from swin_moe.tasks.detect import Detect

ALL = 10_000  # candidates of an image: no draw decides


def test_losses_gradients_and_detections_are_ours():
    config = load_config("canvas_mask_rcnn", [f"task.detect.anchors={ALL}", f"task.detect.boxes={ALL}"])
    task = Detect(config)
    network = task.build_network()
    network.init_weights(0)
    size = config.model.img_size
    loader = TrainLoader(config.data, size, seed=0, rank=0, world_size=1, micro_batch=4, accumulation=1, boxes=True)
    with loader:
        (batch,) = next(iter(loader.batches(0, 1))).batches
    task.connect(network, type("Alone", (), {"world": None})())  # type: ignore[arg-type]  # of Groups it asks this alone
    loss = task.loss(network, batch, StepContext(config, 0, 1, 4, nullcontext)).total
    loss.backward()
    numbers = replace(plain.Numbers(), anchors=ALL, boxes=ALL)
    params = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    truth = list(zip(batch["boxes"], batch["labels"], batch["masks"]))
    found = plain.losses(params, numbers, batch["image"], batch["size"], truth)
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(params[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m)
    sure = {name: p.detach() * (8 if name.endswith("fc_cls.weight") else 1) for name, p in params.items()}
    network.load_state_dict(sure)
    with torch.no_grad():
        ours = network.eval()(batch["image"], batch["size"])
    theirs = plain.detect(sure, numbers, batch["image"], batch["size"])
    assert sum(len(one.boxes) for one in ours) > 10
    for one, (boxes, scores, labels, masks) in zip(ours, theirs, strict=True):
        assert torch.equal(one.labels, labels)
        torch.testing.assert_close(one.boxes, boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one.scores, scores, rtol=1e-4, atol=1e-5)
        pasted, drawn = paste_masks(one.masks, one.boxes, (64, 64)), plain.paste(masks, boxes, 64, 64)
        assert (pasted != drawn).float().mean() < 1e-3
