"""Transformers of diffusers as backbones: unchanged models whose lowest self-attentions also see earlier steps."""
