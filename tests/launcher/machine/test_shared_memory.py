"""Segments that nobody uses are removed, and no other."""

import os
import time

from launcher.machine.shared_memory import held, remove, remove_abandoned


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


def test_what_a_rank_held_is_removed_once_nobody_has_it(tmp_path):
    shared, processes = tmp_path / "shm", tmp_path / "proc"
    for folder in (shared, processes / "7"):
        folder.mkdir(parents=True)
    for name in ("mine_0", "mine_1", "mine_10", "other"):
        (shared / name).touch()
    lines = [f"7f-8f rw-s 0 00:1 9   {shared}/mine_{number}" for number in (1, 0, 0)]
    (processes / "maps").write_text(
        "\n".join([*lines, f"7f-8f rw-s 0 00:1 9 {shared}/gone (deleted)", "7f r-x /bin/x"])
    )
    assert held(processes / "maps", shared) == ["mine_0", "mine_1"]
    assert held(processes / "missing", shared) == []
    (processes / "7" / "maps").write_text(f"7f-8f rw-s 0 00:1 9 {shared}/mine_10\n")
    assert remove(["mine_0", "mine_1", "mine_10", "gone"], shared, processes) == ["mine_0", "mine_1"]
    assert sorted(path.name for path in shared.iterdir()) == ["mine_10", "other"]
    (processes / "7" / "maps").unlink()
    assert remove(["mine_10"], shared, processes) == ["mine_10"]
