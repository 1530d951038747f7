"""The configuration of a run: the models of all sections, read from a YAML file and the command line. No torch in here."""

from dtl.config.load import builtin_recipes, config_from_dict, load_config, resolve_config
from dtl.config.models import Config, DataConfig, PhaseConfig, Section, flat

__all__ = ["Config", "DataConfig", "PhaseConfig", "Section", "builtin_recipes", "config_from_dict", "flat", "load_config", "resolve_config"]
