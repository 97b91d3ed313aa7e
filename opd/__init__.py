"""Video-OPD: on-policy distillation of multimodal models for temporal video grounding."""
