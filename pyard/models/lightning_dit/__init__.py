"""LightningDiT (Yao et al. 2025), and DiTs that normalise queries and keys."""
