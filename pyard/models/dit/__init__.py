"""The class-conditional diffusion transformer: the network and its checkpoints."""
