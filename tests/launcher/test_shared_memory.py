"""Segments that nobody uses are removed, and no other."""

import os
import time

from launcher.machine.shared_memory import remove_abandoned


def test_only_old_segments_of_nobody_are_removed(tmp_path):
    shared, processes = tmp_path / "shm", tmp_path / "proc"
    shared.mkdir()
    for name in ("mpich_shm_old_0", "mpich_shm_used_0", "mpich_shm_new_0", "sem.other"):
        (shared / name).touch()
        if "new" not in name:
            os.utime(shared / name, (time.time() - 60,) * 2)
    (processes / "7").mkdir(parents=True)
    (processes / "7" / "maps").write_text(
        f"7f-8f rw-s 0 00:1 9 {shared}/mpich_shm_used_0\n7f-8f r-xp 0 00:1 9 /bin/x\n"
    )
    (processes / "8").mkdir()  # a process that is just gone has no maps
    assert remove_abandoned(shared, processes) == [shared / "mpich_shm_old_0"]
    assert sorted(path.name for path in shared.iterdir()) == ["mpich_shm_new_0", "mpich_shm_used_0", "sem.other"]
    assert remove_abandoned(tmp_path / "missing", processes) == []
