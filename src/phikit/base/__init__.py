"""Level 0: configuration, typed errors, the run folder, and the value types every room speaks.

Import from the modules (`from phikit.base.errors import ConfigError`); this file stays empty so
that reading a config never pays for importing torch.
"""
