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

__all__ = [
    "CheckpointConfig",
    "CompatConfig",
    "Config",
    "DataConfig",
    "DatasetName",
    "DebugConfig",
    "EngineConfig",
    "Family",
    "LogConfig",
    "ModelConfig",
    "MoEConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TaskConfig",
]
