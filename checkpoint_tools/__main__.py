"""`swin-moe checkpoint VERB ...` = `python -m checkpoint_tools VERB ...`, also after `python -m launcher -n K --`.

A verb is a module with two functions, `configure(parser)` and `run(arguments, options) -> exit code`, and a row here.
"""

import importlib
import os
import sys
import time
import traceback

from checkpoint_tools.ranks import join_ranks
from checkpoint_tools.verbs.arguments import add_common_arguments, build_options
from swin_moe.checkpoint.errors import describe, out_of_memory
from swin_moe.config.arguments import Parser, nearest

PROGRAM = "swin-moe checkpoint"
_EXAMPLES = """examples:
  what a run's newest checkpoint holds
    swin-moe checkpoint inspect output/mine
  an official file as ours
    swin-moe checkpoint convert swin_tiny_patch4_window7_224.pth mine --to native
  for programs that are not ours
    swin-moe checkpoint export output/mine mine.safetensors --to safetensors"""
VERBS = {
    "inspect": ("checkpoint_tools.verbs.inspect", "what a checkpoint holds, and where"),
    "verify": ("checkpoint_tools.verbs.verify", "compare every byte with its digest; each element is there just once"),
    "diff": ("checkpoint_tools.verbs.diff", "what differs between two checkpoints of any formats"),
    "plan": ("checkpoint_tools.verbs.plan", "what a conversion would read and write; touches nothing"),
    "reshard": ("checkpoint_tools.verbs.reshard", "write a checkpoint anew, checked against another number of ranks"),
    "convert": ("checkpoint_tools.verbs.convert", "from any format to any format"),
    "upcycle": ("checkpoint_tools.verbs.upcycle", "a dense network as one with experts"),
    "experts": ("checkpoint_tools.verbs.experts", "another number of experts: duplicate, split, merge or prune them"),
    "average": ("checkpoint_tools.verbs.average", "the weighted mean of several checkpoints' parameters"),
    "export": ("checkpoint_tools.verbs.export", "to safetensors, ONNX or a torch.export program"),
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where a verb found differences, else launcher.failure.kinds'."""
    from launcher.env import speaks_first
    from launcher.failure.kinds import CONFIGURATION, INTERRUPTED, MEMORY  # entry points only

    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        print(f"usage: {PROGRAM} VERB [arguments]; {PROGRAM} VERB --help says more\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in VERBS.items()))
        print(f"\n{_EXAMPLES}")
        return 0 if argv else CONFIGURATION
    if argv[0] not in VERBS:
        near = nearest(argv[0], VERBS)
        there = not near and os.path.exists(argv[0])
        meant = f"did you mean {PROGRAM} inspect {argv[0]}? " if there else f"did you mean {near}? " if near else ""
        print(f"error: unknown verb {argv[0][:80]!r}; {meant}allowed: {', '.join(VERBS)}", file=sys.stderr)
        return CONFIGURATION
    try:
        module, text = VERBS[argv[0]]
        verb = importlib.import_module(module)
        parser = Parser(prog=f"{PROGRAM} {argv[0]}", description=text + ".")
        verb.configure(parser)
        add_common_arguments(parser)
        arguments = parser.parse_args(argv[1:])
        return verb.run(arguments, build_options(arguments, join_ranks()))
    except KeyboardInterrupt:
        print("interrupted; the same command continues what it can", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the command line ends in silence
        raise
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        short = out_of_memory(error)
        if short is None and not isinstance(error, ValueError | OSError):
            raise
        if os.environ.get("SWIN_MOE_TRACEBACK"):
            traceback.print_exc()
        if not speaks_first(os.environ):
            time.sleep(3)  # all ranks raise the same, and this one's exit ends them: rank 0 has to say it first
        else:
            words = describe(error) if short is None else f"{short}: lower --max-memory, or use fewer ranks on a host"
            print(f"error: {words}", file=sys.stderr, flush=True)
        return CONFIGURATION if short is None else MEMORY


def run(argv: list[str] | None = None) -> None:
    """Runs the command line on this rank: alone, or as one of mpirun's."""
    from launcher import mpi
    from launcher.unread import until_unread

    mpi.call(lambda: sys.exit(until_unread(lambda: main(argv))))


if __name__ == "__main__":
    run()
