"""diffusers' text-to-image pipelines as teachers: the differences between them, and their text encoders."""

from pyard.teachers.text_to_image.families import GuidanceKind, PipelineConfigs, PipelineFamily, SchedulerCall
from pyard.teachers.text_to_image.pipelines import PIPELINES, pipeline_family
from pyard.teachers.text_to_image.text_encoder import PipelineTextEncoder

__all__ = [
    "PIPELINES",
    "GuidanceKind",
    "PipelineConfigs",
    "PipelineFamily",
    "PipelineTextEncoder",
    "SchedulerCall",
    "pipeline_family",
]
