"""align.yaml: what it may say (`schema`), and how it is read and written (`file`)."""

from align.config.file import (
    CONFIG_NAME,
    RENAMED,
    build_config,
    checkpoint_config,
    commented_config,
    dump_config,
    find_config,
    load_config,
)
from align.config.schema import (
    Config,
    CriticSettings,
    DpoSettings,
    ImagePreference,
    LaunchSettings,
    ModelSettings,
    SampleSettings,
    Server,
    ServerSettings,
    Source,
    VllmSettings,
)

__all__ = [
    "CONFIG_NAME",
    "RENAMED",
    "Config",
    "CriticSettings",
    "DpoSettings",
    "ImagePreference",
    "LaunchSettings",
    "ModelSettings",
    "SampleSettings",
    "Server",
    "ServerSettings",
    "Source",
    "VllmSettings",
    "build_config",
    "checkpoint_config",
    "commented_config",
    "dump_config",
    "find_config",
    "load_config",
]
