"""Properties are tried on the same examples in every run, however slow the machine is."""

from hypothesis import settings

settings.register_profile("duohuo", deadline=None, derandomize=True)
settings.load_profile("duohuo")
