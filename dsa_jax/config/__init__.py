"""Settings as nested dataclasses: a recipe, the model in it, and how they are read, checked and written."""

from dsa_jax.config.attention import AttentionConfig, IndexerConfig, NSAConfig, RopeConfig
from dsa_jax.config.checks import ConfigError
from dsa_jax.config.fields import from_dict, to_dict
from dsa_jax.config.model import LayerSpec, ModelConfig, MoEConfig
from dsa_jax.config.recipe import (
    AXES,
    BATCH_AXES,
    STAGES,
    TASKS,
    TEXT_TASKS,
    Config,
    DataConfig,
    EvalConfig,
    InitConfig,
    OptimizerConfig,
    ParallelConfig,
    RecallConfig,
    StageConfig,
    TaskConfig,
    TextConfig,
    TrainConfig,
)

__all__ = [
    "AXES",
    "BATCH_AXES",
    "STAGES",
    "TASKS",
    "TEXT_TASKS",
    "AttentionConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "IndexerConfig",
    "InitConfig",
    "LayerSpec",
    "MoEConfig",
    "ModelConfig",
    "NSAConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RecallConfig",
    "RopeConfig",
    "StageConfig",
    "TaskConfig",
    "TextConfig",
    "TrainConfig",
    "from_dict",
    "to_dict",
]
