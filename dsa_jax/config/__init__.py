"""Settings as nested dataclasses: a recipe, the model in it, and how they are read, checked and written."""

from dsa_jax.config.attention import AttentionConfig, IndexerConfig, NSAConfig, RopeConfig
from dsa_jax.config.checks import ConfigError
from dsa_jax.config.data import TASKS, DataConfig, RecallConfig, TaskConfig, TextConfig
from dsa_jax.config.evaluation import ARGMAX, BOTH, GENERATION, GENERATION_ROOM, TEXT_TASKS, EvalConfig
from dsa_jax.config.fields import from_dict, to_dict
from dsa_jax.config.model import LayerSpec, ModelConfig, MoEConfig
from dsa_jax.config.parallel import AXES, BATCH_AXES, ParallelConfig
from dsa_jax.config.recipe import Config, InitConfig
from dsa_jax.config.stage import OptimizerConfig, StageConfig
from dsa_jax.config.training import STAGES, TrainConfig

__all__ = [
    "ARGMAX",
    "AXES",
    "BATCH_AXES",
    "BOTH",
    "GENERATION",
    "GENERATION_ROOM",
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
