"""Options of a run: schema.py says which there are, checks.py refuses, io.py reads YAML, official.py their files.

Tables: choices.CHOICES and variants.VARIANTS, what a routing choice and a network mean in numbers.
A new option is one field of a section in schema.py, with its range; io.py finds it there, for files and key=value.
"""

from swin_moe.config.schema import (
    CheckpointConfig,
    CompatConfig,
    Config,
    DataConfig,
    DatasetName,
    DebugConfig,
    EngineConfig,
    Family,
    LogConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TaskConfig,
)
from swin_moe.config.tasks import ClassifyOptions, DistillOptions, MoBYOptions, SimMIMOptions, TaskOptions

__all__ = [
    "CheckpointConfig",
    "ClassifyOptions",
    "CompatConfig",
    "Config",
    "DataConfig",
    "DatasetName",
    "DebugConfig",
    "DistillOptions",
    "EngineConfig",
    "Family",
    "LogConfig",
    "MoBYOptions",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "SimMIMOptions",
    "TaskConfig",
    "TaskOptions",
]
