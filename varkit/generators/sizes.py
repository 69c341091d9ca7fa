"""What generators' configurations check alike: numbers that no network can have."""

from typing import Any

from varkit.errors import UserError


def check_least(config: object, least: float, *names: str, of: str = "") -> None:
    """Raise `UserError` for a number below `least` by any of these names; `of` comes before the name."""
    for name in names:
        if (value := getattr(config, name)) < least:
            raise UserError(f"{of}{name} is {value}; it must be at least {least}")


def check_rates(config: object, *names: str) -> None:
    """Raise `UserError` for what is no rate of dropping something."""
    for name in names:
        if not 0 <= (value := getattr(config, name)) < 1:
            raise UserError(f"{name} is {value}; it must be >= 0 and below 1")


def check_scale_transformer(config: Any) -> None:
    """Raise `UserError` for what no `varkit.generators.scale_transformer.ScaleTransformer` is made of."""
    check_least(config, 1, "width", "heads", "code_width")
    check_least(config, 0, "norm_eps")
    check_heads(config)
    check_ratio(config)
    check_rates(config, "drop_path")


def check_ratio(config: Any) -> None:
    """Raise `UserError` for a feed-forward layer of no width."""
    if config.mlp_ratio <= 0:
        raise UserError(f"mlp_ratio is {config.mlp_ratio}; it must be above 0 (4 is usual)")


def check_heads(config: Any) -> None:
    """Raise `UserError` for a width that does not split into the heads."""
    if config.width % config.heads:
        raise UserError(f"width {config.width} is not a multiple of {config.heads} heads; change one of them")
