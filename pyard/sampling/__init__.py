"""Drawing samples with a student, in batches or compiled, and measuring its exposure bias."""
