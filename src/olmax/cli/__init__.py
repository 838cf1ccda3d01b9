"""The `olmax` command: one file per verb, each a dataclass whose fields are the options."""
