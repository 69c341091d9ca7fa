"""Teacher forcing in which scales count by weights of their own (`varkit.plans.scale_weights`)."""

from varkit.plans.scale_weights import token_weights
from varkit.plans.scales import ScalePlan
from varkit.tokenizers.base import Tokenizer
from varkit.train.lessons import WholePlan


class WeighedScales(WholePlan):
    """Teacher forcing whose loss is the sum of `token_weights` times each token's."""

    def __init__(self, tokenizer: Tokenizer, plan: ScalePlan, weights: str = "lognorm") -> None:
        super().__init__(tokenizer, plan)
        self.settings = {"kind": type(self).__name__, "weights": weights}
        # The objective divides by the number of tokens.
        self._weights = (token_weights(weights, plan.schedule) * plan.schedule.total).float()
