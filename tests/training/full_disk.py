"""`python -m tests.training.full_disk BYTES CONFIG key=value ...`: a training run whose disk is full after so many
bytes of checkpoints, as a small disk is: some of what a rank writes is there, then nothing more goes."""

import errno
import os
import sys

import torch

from swin_moe.run.session import run_main
from swin_moe.train import main

pwrite = os.pwrite
room = int(sys.argv[1])


def write(fd, data, offset):
    """Writes as long as there is room; as Linux does, names no file."""
    global room  # noqa: PLW0603 - of this process
    if not room:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "/checkpoints/" in os.readlink(f"/proc/self/fd/{fd}"):
        data = data[:room]
        room -= len(data)
    return pwrite(fd, data, offset)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.pwrite = write  # type: ignore[assignment]  # a stand-in
    run_main(main, sys.argv[2:])
