"""Drawing samples with a student: in batches, compiled, as a diffusers pipeline; and its exposure bias."""
