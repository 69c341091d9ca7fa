"""The model that commands draw with unless another is named. No torch here: `--help` reads it too."""

DEFAULT_MODEL = "scenes-tidy"
