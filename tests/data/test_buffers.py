"""Memory of batches is used again, never while a batch in it is looked at, and what does not fit is sent instead."""

import pickle

import numpy as np
import pytest
import torch

from swin_moe.config import DataConfig
from swin_moe.data import source as source_module
from swin_moe.data.buffers import Buffers, Place
from swin_moe.data.loader import TrainLoader


def test_arrays_are_where_they_were_put():
    buffers = Buffers(2, 5000)
    assert len(buffers) == 2
    for number in (0, 1, 0):
        buffer = buffers[number]
        buffer.clear()
        levels, sent = buffer.put_empty((2, 3), np.uint8)
        levels[...] = number
        values = buffer.put(np.arange(4, dtype=np.float32) + number)
        assert sent == Place(0, (2, 3), "|u1") and values == Place(64, (4,), "<f4")
        assert (buffer.at(sent) == number).all() and buffer.at(values).tolist() == [number + n for n in range(4)]
    assert (buffers[1].at(sent) == 1).all()


def test_what_does_not_fit_is_sent_itself():
    buffer = Buffers(1, 4096)[0]
    first = buffer.put(np.ones(4000, dtype=np.uint8))
    array = np.arange(100, dtype=np.float32)
    sent = buffer.put(array)
    assert isinstance(first, Place) and isinstance(sent, np.ndarray) and not np.shares_memory(sent, array)
    assert buffer.at(sent).tolist() == array.tolist() and (buffer.at(first) == 1).all()


def test_where_memory_is_not_shared_everything_is_sent():
    copy = pickle.loads(pickle.dumps(Buffers(3, 5000)))
    assert len(copy) == 3
    assert isinstance(copy[2].put(np.zeros(1, dtype=np.uint8)), np.ndarray)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("size_of_buffers", [1.0, 0.4, 0.0], ids=["large", "too_small", "none"])
def test_batches_keep_their_images(image_root, workers, size_of_buffers, monkeypatch):
    """Every batch is compared after all were loaded, and so buffers written many times."""
    options = {"erase_prob": 1.0, "global_batch": 6, "workers": workers}
    config = DataConfig(name="folder", path=str(image_root), **options)
    arguments = {"seed": 0, "rank": 0, "world_size": 1, "micro_batch": 3, "accumulation": 2, "partners": True}
    made = Buffers
    monkeypatch.setattr(source_module, "Buffers", lambda count, size: made(count, int(size * size_of_buffers)))
    with TrainLoader(config, (20, 24), **arguments) as loader:
        batches = [batch for step in loader.batches(0, 9) for batch in step]
    transform, dataset = loader._source._transform, loader.dataset
    for number, batch in enumerate(batches):
        request = loader._request(*divmod(number, 2))
        images = torch.cat([batch["image"], batch["extra_image"]])
        assert len(images) == len(request.index) == 4 and batch["sample"].tolist() == request.sample[:3].tolist()
        for image, index in zip(images, request.index.tolist()):
            key = source_module.augment_key(0, request.epoch, index)
            assert torch.equal(image, transform(dataset.sample(index)[0], key))
