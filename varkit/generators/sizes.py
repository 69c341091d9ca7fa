"""What generators' configurations check alike: numbers that no network can have."""

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


def check_scale_transformer(config: object) -> None:
    """Raise `UserError` for what no `varkit.generators.scale_transformer.ScaleTransformer` is made of."""
    check_least(config, 1, "width", "heads", "code_width")
    check_least(config, 0, "norm_eps")
    check_ratio(config)
    check_rates(config, "drop_path")


def check_ratio(config: object, name: str = "mlp_ratio") -> None:
    """Raise `UserError` for a ratio of sizes that is not positive."""
    if (value := getattr(config, name)) <= 0:
        raise UserError(f"{name} is {value}; it must be above 0 (4 is usual)")
