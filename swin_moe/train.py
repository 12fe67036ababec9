"""Training: `swin-moe train CONFIG key=value ...` or `python -m swin_moe.train CONFIG key=value ...`."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from swin_moe.checkpoint import CheckpointManager, resolve, together
from swin_moe.config import Config
from swin_moe.config.io import dump_config
from swin_moe.data.batch import to_device
from swin_moe.data.loader import StepBatches, TrainLoader
from swin_moe.engine.base import ENGINES, Engine, StepStats, check_members
from swin_moe.engine.gradient_watch import GradientWatch
from swin_moe.evaluate import build_eval_loader
from swin_moe.optim import build_schedule
from swin_moe.parallel.compile import graphs_made
from swin_moe.parallel.exchange.padded import even_batches
from swin_moe.parallel.replicas import first_differing_replica
from swin_moe.registry import lookup
from swin_moe.run.data_fit import warn_of_small_images, with_counted_classes
from swin_moe.run.expert_load import start_clocks
from swin_moe.run.folder import FolderLock, holding
from swin_moe.run.identity import RunIdentity, begin, place_in_data
from swin_moe.run.metrics import LOGGER, MetricsWriter, Progress, duration, start_logging
from swin_moe.run.micro_steps import MicroSteps
from swin_moe.run.session import Session, build_meta_model, open_session, parse_arguments, run_main
from swin_moe.run.state import Progressed, Stopped, StopRequest
from swin_moe.run.step_records import StepRecords
from swin_moe.run.summary import describe
from swin_moe.run.training_graphs import check_training
from swin_moe.tasks.base import StepContext, StepDone, build_task
from swin_moe.usage.texts import TRAIN
from swin_moe.weights.load import check_sources, start_from
from swin_moe.weights.teacher import load_teacher

MAX_SKIPPED_STEPS = 10  # in a row, outside fp16: more means that the run is lost, not unlucky


class Trainer:
    """One run: the loop, its records and its checkpoints. Knows no task, engine or dispatcher by name."""

    def __init__(self, session: Session):
        config = session.config
        self.session, self.config, self.first_rank = session, config, session.rank == 0
        self.task = build_task(config)
        if self.task.needs_teacher:
            self.task.teacher = load_teacher(session)
        engine = lookup(ENGINES, config.engine.name, key="engine.name")  # first: a missing package costs no work
        together(resolve(session.groups.world), self._build_loaders)  # one rank's bad data is every rank's error
        self.identity = RunIdentity.of(config, self.loader.dataset, self.eval_loader.dataset)
        self.identity.compare_ranks(session.groups.world)
        self.schedule = build_schedule(
            config.optim,
            steps_per_epoch=self.loader.steps_per_epoch,
            global_batch=config.data.global_batch,
            delay=int(config.compat.official),
        )
        self.engine: Engine = engine(
            build_meta_model(session, self.task),
            config=config,
            groups=session.groups,
            schedule=self.schedule,
            device=session.device,
        )
        check_members(self.engine, config.engine.name)
        self.heartbeat = session.heartbeat
        self.heartbeat.follow(self.engine.local_model)
        self.micro_steps = MicroSteps(session, self.task, self.engine)
        self.gradients = GradientWatch(self.engine.local_model, session.groups)
        self.checkpoints = CheckpointManager(
            session.directory / "checkpoints",
            group=session.groups.world,
            keep=config.checkpoint.keep,
            file_size=config.checkpoint.file_size,
            asynchronous=config.checkpoint.asynchronous,
            save_group=session.groups.checkpoint,
        )
        self.progress = Progressed()
        self.records = StepRecords(
            session, self.engine, total=self.schedule.total, steps_per_epoch=self.loader.steps_per_epoch
        )
        self.stop = StopRequest()

    def _build_loaders(self) -> None:
        config, session = self.config, self.session
        micro_batch, accumulation = config.accumulation(session.world_size)
        self.loader = TrainLoader(
            config.data,
            config.model.img_size,
            seed=config.run.seed,
            rank=session.rank,
            world_size=session.world_size,
            micro_batch=micro_batch,
            accumulation=accumulation,
            partners=self.task.needs_partners,
            pin_memory=session.device.type == "cuda",
            num_classes=config.model.num_classes,
            views=self.task.needs_views,
            boxes=self.task.needs_boxes,
            label_maps=self.task.needs_label_maps,
        )
        dense = self.task.needs_boxes or self.task.needs_label_maps  # validation may number its classes otherwise
        classes = self.loader.dataset.classes if dense else ()
        self.eval_loader = build_eval_loader(config, session, task=self.task, classes=classes)

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.session.device

    def resume(self) -> None:
        """Continues from checkpoint.load if given, else from the run's newest checkpoint; a run without any begins
        with the weights of checkpoint.init, where that is set."""
        if self.config.checkpoint.resume == "never" and (newest := self.checkpoints.latest()) is not None:
            raise ValueError(
                f"checkpoint.resume=never, but {self.session.directory} holds {newest.name}; choose another run.name, "
                "or continue it with checkpoint.resume=auto"
            )
        images, source = len(self.loader), self.config.checkpoint.load
        state = self.checkpoints.resume(self.engine.pieces(), source=source, check=self.identity.check_resume)
        if state is None:
            self.progress = begin(self.config, images=images)
            if self.config.checkpoint.init:
                LOGGER.info("initial weights: %s", start_from(self.config.checkpoint.init, self.engine, self.session))
            return
        index = self.checkpoints.resumed_from
        assert index is not None, "it gave the state"
        changed = self.identity.check_resume(index)
        self.engine.load_state(state["engine"])
        self.progress = place_in_data(index, self.config, images=images, own=index.path.parent == self.checkpoints.root)
        LOGGER.info("resumed from step %d (%d images seen)", self.progress.step, self.progress.samples)
        if changed:
            LOGGER.info("resumed with changed options: %s", ", ".join(changed))

    def run(self) -> None:
        """Trains to the end of the schedule, or to a stop request."""
        total = self.schedule.total
        if self.progress.step >= total:
            LOGGER.info(
                "run %s is already finished (step %d of %d); nothing to do",
                self.session.directory,
                self.progress.step,
                total,
            )
            return
        self.bar = Progress(total, enabled=self.first_rank)
        self.writer = MetricsWriter(
            self.session.directory,
            enabled=self.first_rank,
            tensorboard=self.config.log.tensorboard,
            resume_step=self.progress.step,
        )
        self.records.open(self.writer, self.bar)
        self.started, self.steps_here = time.monotonic(), 0
        self.heartbeat.patient = self.config.parallel.compile != "none"
        self.graphs_before = graphs_made() if self.heartbeat.patient else 0
        self.heartbeat.enter("loading data", step=self.progress.step, long=True)  # loader processes start
        try:
            if self.config.log.eval_first:
                self._report(self._evaluate(), "before the first step")
            for batches in self.loader.batches(self.progress.step, total):
                if self._train_step(batches):
                    break
        finally:
            self.bar.clear()
            self.loader.close()
            self.writer.close()
            self.checkpoints.close()
        if self.progress.step >= total:
            best = float("nan") if self.progress.best is None else abs(self.progress.best)  # kept as higher is better
            LOGGER.info("finished: step %d of %d, best %s %.4g", self.progress.step, total, self.task.metric, best)

    def _train_step(self, batches: StepBatches) -> bool:
        """Takes one optimizer step and what follows it; returns whether the ranks agreed to stop."""
        step = self.progress.step
        context = replace(self._context(step, self._count(batches)), weight=self.micro_steps.weigh(batches))
        if self.records.due(step + 1) and self.micro_steps.has_phases:
            start_clocks(self.engine.local_model, self.device)
        # Whole steps are micro-batches of one size on every rank, unless images were skipped.
        even = batches.num_samples == self.config.data.global_batch and self.config.data.on_broken != "skip"
        with even_batches(self.engine.local_model, even):
            losses = self.micro_steps.run(batches, context)
        self.heartbeat.enter("reduction of gradients and update")
        # Task loss, auxiliary loss, images, stop request, failed save: all that ranks must agree on.
        own = torch.zeros(5, dtype=torch.float64, device=self.device)
        own[:2] = losses
        facts = (sum(len(batch["image"]) for batch in batches), self.stop.number, self.checkpoints.failed)
        for place, fact in enumerate(facts, 2):
            own[place] = float(fact)  # not as one tensor from the host, whose copy would wait for the device
        rows = self.engine.measure(own)
        task_loss, aux_loss, images, stop, save_failed = map(sum, zip(*rows))
        if save_failed:
            self.checkpoints.wait()  # raises, on every rank
        if stop:
            self.stop.agree([row[3] for row in rows])
        if not math.isfinite(task_loss + aux_loss):
            self._refuse_loss(step, rows)
        stats = self.engine.step(step)
        self._note_skip(step, stats, lambda: self.micro_steps.run(batches, context, watched=True))
        if self.task.changes_weights and not stats.skipped:
            done = StepDone(step, self.schedule.total, self.progress.samples)
            self.engine.change_weights(lambda parts: self.task.after_step(parts, done))
        self.progress.step, self.progress.samples = step + 1, self.progress.samples + int(images)
        self._note_graphs()
        self._record(task_loss, aux_loss, images, stats)
        self._check_replicas()
        self._evaluate_and_save(stopping=stop > 0)
        self.heartbeat.enter("loading data", step=step + 1)
        return stop > 0

    def _context(self, step: int, num_samples: int) -> StepContext:
        return StepContext(self.config, step, self.session.world_size, num_samples, self.engine.autocast)

    def _count(self, batches: StepBatches) -> int:
        """Returns the images of the step over all ranks; asks them only where broken images may have been skipped."""
        if self.config.data.on_broken != "skip":
            return batches.num_samples
        own = sum(len(batch["image"]) for batch in batches)
        if self.session.world_size == 1:
            return max(1, own)
        count = torch.tensor(own, device=self.device)
        dist.all_reduce(count)
        return max(1, int(count))

    def _refuse_loss(self, step: int, rows: list[list[float]]) -> None:
        """Raises for a loss that is not finite, naming the ranks; the weights are those of the last good step."""
        bad = [
            f"rank {rank}: loss {task:g}, auxiliary loss {aux:g}"
            for rank, (task, aux, *_) in enumerate(rows)
            if not math.isfinite(task + aux)
        ]
        raise ValueError(
            f"the loss is not finite at step {step} (epoch {step / self.loader.steps_per_epoch:.2f}), "
            f"{'; '.join(bad)}; nothing was updated or saved with it. Last checkpoint: "
            f"{self.checkpoints.latest() or 'none'}. Lower optim.lr, set optim.clip_norm, or use engine.precision=fp32"
        )

    def _note_skip(self, step: int, stats: StepStats, repeat: Callable[[], object]) -> None:
        """Reports a skipped step with the parameter; gives up after too many in a row (fp16 may search its scale).

        repeat: Runs forward and backward of the step again.
        """
        if not stats.skipped:
            self.progress.skipped = 0
            return
        self.progress.skipped += 1
        after = self.engine.discard_gradients()
        # Before the reduction, so with the rank; an overflow in the reduction itself is seen only after it.
        with self.engine.loss_scale.at(stats.loss_scale):
            found = self.gradients.find(repeat)
        self.engine.discard_gradients()
        where = found or (f"{after} after the reduction, on rank {self.session.rank}" if after else "unknown")
        LOGGER.warning(
            "step %d skipped on all ranks: gradient norm %g; first not finite: %s", step, stats.grad_norm, where
        )
        limit = MAX_SKIPPED_STEPS * (5 if self.config.engine.precision == "fp16" else 1)
        if self.progress.skipped >= limit:
            raise ValueError(
                f"{self.progress.skipped} steps in a row had gradients that are not finite, up to step {step} "
                f"(first not finite: {where}); last checkpoint: {self.checkpoints.latest() or 'none'}"
            )

    def _note_graphs(self) -> None:
        """Says, after the second step, what compiling took: the first makes graphs, the second may widen them."""
        self.steps_here += 1
        if self.steps_here == 2 and self.config.parallel.compile != "none":
            self.heartbeat.patient = False
            seconds, graphs = time.monotonic() - self.started, graphs_made() - self.graphs_before
            LOGGER.info("compiled %d graphs, in the first two steps, which took %s", graphs, duration(seconds))

    def _record(self, task_loss: float, aux_loss: float, images: float, stats: StepStats) -> None:
        """Notes the step that was taken."""
        self.records.add(self.progress.step, task_loss=task_loss, aux_loss=aux_loss, images=images, stats=stats)

    def _check_replicas(self) -> None:
        every = self.config.debug.check_replicas
        if every and self.progress.step % every == 0:
            name = first_differing_replica(self.engine.local_model, self.session.groups)
            if name is not None:
                raise ValueError(
                    f"dense parameter {name} is not bit-identical on all ranks after step {self.progress.step}"
                )

    def _due(self, every: float) -> bool:
        """Returns whether a period of `every` epochs ends with this step."""
        per_epoch, step = self.loader.steps_per_epoch, self.progress.step
        return every > 0 and int(step / per_epoch / every) > int((step - 1) / per_epoch / every)

    def _evaluate_and_save(self, *, stopping: bool) -> None:
        step, finished = self.progress.step, self.progress.step >= self.schedule.total
        improved = False
        if (self._due(self.config.log.eval_every) or finished) and not (stopping and not finished):
            improved = self._judge()
        every = self.config.checkpoint.every
        due = step % every == 0 if every else self._due(self.config.checkpoint.every_epochs)
        if due or finished or stopping or improved:
            self._save(improved)
        if stopping or finished:
            self.checkpoints.wait()
        if stopping:
            self.bar.clear()
            words = "stopped by %s at step %d; checkpoint saved, run the same command to continue"
            LOGGER.info(words, self.stop.name, step)

    def _evaluate(self) -> dict[str, float]:
        """Returns the metrics of the weights as they are."""
        with self.engine.evaluation():
            loaded = self.heartbeat.over(self.eval_loader, "evaluation batch")
            batches = (to_device(b, self.device, self.config.engine.precision) for b in loaded)
            return self.task.evaluate(self.engine.local_model, batches, self._context(self.progress.step, 0))

    def _judge(self) -> bool:
        """Evaluates, writes the result, and returns whether it is the best so far."""
        started = time.monotonic()
        result = self._evaluate()
        value = result[self.task.metric] * (1 if self.task.higher_is_better else -1)
        improved = self.progress.best is None or value > self.progress.best
        if improved:
            self.progress.best = value
        self.writer.write(self.progress.step, {f"eval/{k}": v for k, v in result.items()})
        self.writer.show(self.progress.step, self.task.pictures())
        took = duration(time.monotonic() - started)
        self._report(result, f"at step {self.progress.step}", f"{' - best so far' if improved else ''} ({took})")
        return improved

    def _report(self, result: dict[str, float], when: str, more: str = "") -> None:
        """Logs an evaluation; what it took belongs to no step's record."""
        self.bar.clear()
        epoch = self.progress.step / self.loader.steps_per_epoch
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in result.items())
        LOGGER.info("evaluation %s (epoch %.1f): %s%s", when, epoch, numbers, more)
        self.records.start_anew()

    def _save(self, best: bool) -> None:
        saved = {k: getattr(self.progress, k) for k in ("step", "samples", "best", "skipped")}
        saved["global_batch"] = self.config.data.global_batch
        self.heartbeat.enter("saving a checkpoint", long=True)
        state = {"progress": saved, "engine": self.engine.state()} | self.identity.state()
        self.checkpoints.save(
            self.progress.step,
            self.engine.pieces(),
            state=state,
            config=self.config,
            best=self.progress.best if best else None,
        )
        self.records.start_anew()


def main(argv: list[str]) -> None:
    """Trains the run that the arguments describe."""
    path, overrides = parse_arguments(argv, TRAIN)
    session = open_session(path, overrides, _choose)
    lock = FolderLock(session.directory)
    with session.watched(), holding(lock):
        # All ranks are one job, so one takes it; before logging, which writes into the folder.
        together(resolve(session.groups.world), lock.enter if session.rank == 0 else lambda: None)
        start_logging(session.directory, session.rank)
        train(session)
    if session.rank == 0 and session.config.parallel.hardware:
        from swin_moe.planner.runs.auto import report

        LOGGER.info("%s", "\n".join(report(session.directory, session.config.parallel.hardware)))


def _choose(config: Config, world_size: int, overrides: Sequence[str]) -> tuple[list[str], str]:
    """Asks the planner, which nothing else in training loads, for a layout."""
    from swin_moe.planner.runs.auto import choose_layout

    return choose_layout(config, world_size, overrides)


def train(session: Session) -> None:
    """Trains a run to its end, or continues it."""
    check_training(session.config, session.device.type, session.world_size)
    check_sources(session)
    trainer = Trainer(with_counted_classes(session))
    warn_of_small_images(session, trainer.loader.dataset)
    for line in describe(trainer.session, trainer.engine):
        LOGGER.info(line)
    trainer.resume()
    if session.rank == 0:  # after it: a resume that is refused leaves the run as it was
        dump_config(trainer.config, session.directory / "config.yaml")
    trainer.run()
    if trainer.progress.step < trainer.schedule.total:
        raise Stopped


if __name__ == "__main__":
    run_main(main)
