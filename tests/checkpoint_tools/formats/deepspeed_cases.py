"""What a DeepSpeed run of our network leaves where its own save_checkpoint is called; runs under MPI."""

from pathlib import Path

from swin_moe.train import Trainer
from tests.equivalence.engine_cases import Case
from tests.equivalence.engine_runs import open_case, take_step

STEPS = 2


def save_both(cases: dict[str, Case], root: str) -> dict[str, str]:
    """Returns our checkpoint of each case; DeepSpeed's own stands in <root>/<name>/deepspeed."""
    ours = {}
    for name, case in cases.items():
        directory = Path(root) / name
        trainer = Trainer(open_case(case, directory))
        trainer.resume()
        for step, batches in zip(range(STEPS), trainer.loader.batches(0, STEPS)):
            take_step(trainer, step, batches)
            trainer.progress.step = step + 1
        trainer._save(False)
        trainer.loader.close()
        ours[name] = str(trainer.checkpoints.latest())
        try:
            trainer.engine.model.save_checkpoint(str(directory / "deepspeed"), tag="global_step2")
        except Exception as error:  # noqa: BLE001 - which of its layouts it cannot save is part of what is tested
            ours[f"{name}.error"] = repr(error)
    return ours
