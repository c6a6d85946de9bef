"""Every parameter, a file a stage: frozen models with bounds, units and the text of the Prefect form; no torch."""

from tasks.config.base import Location, StageConfig, resolve_location
from tasks.config.chat import ChatSettings
from tasks.config.endpoint import EndpointConfig
from tasks.config.evaluation import EvaluationConfig
from tasks.config.generation import GenerationConfig
from tasks.config.judging import JudgeConfig, JudgingConfig, PairPolicy
from tasks.config.pipeline import ApprovalPoint, PipelineConfig
from tasks.config.promotion import PromotionConfig, PublishingConfig
from tasks.config.rounds import RoundsConfig
from tasks.config.sweep import Preset, SweepConfig
from tasks.config.training import TrainingConfig
