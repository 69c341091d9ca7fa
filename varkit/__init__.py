"""varkit: visual autoregressive models, from pixels to pictures, on one engine.

    import varkit
    images = varkit.load("scenes-tidy").generate(["two red circles on a beige background"], seed=0)

Nothing heavy is imported until it is used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Pipeline", "load"]

if TYPE_CHECKING:
    from varkit.hub.pipeline import Pipeline, load


def __getattr__(name: str) -> Any:
    if name in __all__:
        from varkit.hub import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'varkit' has no attribute {name!r}")
