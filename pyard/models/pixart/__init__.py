"""PixArt-alpha and PixArt-Sigma."""
