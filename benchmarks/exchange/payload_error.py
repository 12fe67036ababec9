"""The rounding error that payloads add to the rows and gradients of a real net: the digits net in training.

    OMP_NUM_THREADS=1 python benchmarks/exchange/payload_error.py [--steps N]

One process; what would travel between ranks is rounded beside the run and changes nothing in it. Per MoE layer, kind of
row and payload: the norm of the error over the norm of the rows, over the last tenth of the steps.
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from swin_moe.engine.base import StepStats  # noqa: E402
from swin_moe.moe.experts import GroupedExperts  # noqa: E402
from swin_moe.parallel.exchange.payload import Codec, HalfRows, ScaledRows, rounding_error  # noqa: E402
from swin_moe.run.metrics import start_logging  # noqa: E402
from swin_moe.run.session import Session, open_session  # noqa: E402
from swin_moe.train import Trainer  # noqa: E402

CODECS: dict[str, Codec] = {
    "bf16": HalfRows(),
    "fp8 (e4m3)": ScaledRows(torch.float8_e4m3fn),
    "e5m2, for comparison": ScaledRows(torch.float8_e5m2),
}
KINDS = ("rows out", "rows home", "gradients out", "gradients home")


class Rounding:
    """Sums of squares per (layer, kind, codec) while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.sums: dict[tuple[str, str, str], Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def note(self, layer: str, kind: str, rows: Tensor) -> None:
        """Adds what every codec would lose on these rows."""
        for name, codec in CODECS.items() if self.on else ():
            self.sums[layer, kind, name] += rounding_error(codec, rows)

    def watch(self, layer: str, experts: GroupedExperts) -> None:
        """Sees the rows that reach and leave the experts, and their gradients."""

        def hook(module: GroupedExperts, arguments: tuple, y: Tensor) -> None:
            for rows, out, back in ((arguments[0], "rows out", "gradients home"), (y, "rows home", "gradients out")):
                self.note(layer, out, rows)
                if rows.requires_grad:
                    rows.register_hook(lambda grad, back=back: self.note(layer, back, grad))

        experts.register_forward_hook(hook)


class WatchedTrainer(Trainer):
    """A trainer whose rounding is on after each of the last tenth of its steps."""

    def __init__(self, session: Session, rounding: Rounding, steps: int) -> None:
        super().__init__(session)
        self.rounding, self.steps = rounding, steps

    def _record(self, task_loss: float, aux_loss: float, images: float, stats: StepStats) -> None:
        super()._record(task_loss, aux_loss, images, stats)
        self.rounding.on = self.progress.step >= 0.9 * self.steps


def main(argv: list[str]) -> None:
    """Trains and prints the table."""
    steps = int(argv[argv.index("--steps") + 1]) if "--steps" in argv else 300
    rounding = Rounding()
    with tempfile.TemporaryDirectory() as directory:
        epochs = f"optim.epochs={steps / 23}"  # 23 steps an epoch
        options = [f"run.output={directory}", epochs, "optim.warmup_epochs=1", "log.eval_every=0"]
        session = open_session("digits_swin_moe", options)
        start_logging(Path(directory), rank=1)  # not on the console
        trainer = WatchedTrainer(session, rounding, steps)
        for name, module in trainer.engine.local_model.named_modules():
            if isinstance(module, GroupedExperts):
                rounding.watch(name.removesuffix(".mlp.experts"), module)
        trainer.run()
    print(f"digits_swin_moe, {trainer.progress.step} steps, torch {torch.__version__}\n")
    print(f"| layer | rows | {' | '.join(CODECS)} |\n" + "|---" * (2 + len(CODECS)) + "|")
    for layer in sorted({key[0] for key in rounding.sums}):
        for kind in KINDS:
            errors = [rounding.sums[layer, kind, name] for name in CODECS]
            print(f"| {layer} | {kind} | {' | '.join(f'{float((e / n).sqrt()):.5f}' for e, n in errors)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
