"""diffusers transformers as backbones: the models are unchanged, but their lowest self-attentions also see earlier steps."""
