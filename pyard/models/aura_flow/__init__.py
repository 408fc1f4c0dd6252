"""AuraFlow as a backbone."""
