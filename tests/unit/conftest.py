"""Properties are tried on the same examples in every run, however slow the machine is."""

from hypothesis import Phase, settings

settings.register_profile(
    "duohuo",
    deadline=None,
    derandomize=True,
    # Explaining why an example fails takes longer than the time limit of a test.
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
settings.load_profile("duohuo")
