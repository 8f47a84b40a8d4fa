"""Settings: one field = one key of a YAML file = one flag of a script."""
