"""Published LlamaGen class-conditional generators (FoundationVision/LlamaGen: `c2i_B_256.pt` ...) <-> our parts.

Legend: C width.
"""

from collections.abc import Mapping

from torch import Tensor

from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub.keymap import Rule, from_published, joined, part, to_published
from varkit.hub.states import State, build_empty

RULES = (
    Rule(r"^generator\.conditioner\.embed\.", "cls_embedding.embedding_table."),
    Rule(r"^generator\.embed\.", "tok_embeddings."),
    Rule(r"^generator\.blocks\.", "layers."),
    Rule(r"\.attention\.qkv\.", ".attention.wqkv."),
    Rule(r"\.attention\.out\.", ".attention.wo."),
    Rule(r"\.ffn\.gate\.", ".feed_forward.w1."),
    Rule(r"\.ffn\.up\.", ".feed_forward.w3."),
    Rule(r"\.ffn\.down\.", ".feed_forward.w2."),
    Rule(r"\.norm1\.", ".attention_norm."),
    Rule(r"\.norm2\.", ".ffn_norm."),
    Rule(r"^generator\.norm\.", "norm."),
    Rule(r"^head\.out\.", "output."),
)

Configs = tuple[LlamaGenConfig, CategoricalConfig]


def generator_configs(state: Mapping[str, Tensor], heads: int | None = None) -> Configs:
    """The configurations of generator and head that the shapes tell, and the number of heads, which they do not.

    By default heads are 64 wide, as released (those of the 3B model, of width 3200, 100).
    """
    for name in (
        "cls_embedding.embedding_table.weight",
        "tok_embeddings.weight",
        "layers.0.feed_forward.w1.weight",
    ):
        if name not in state:
            raise UserError(f"the checkpoint lacks {name}; check that it is a class-conditional LlamaGen")
    vocab_size, width = state["tok_embeddings.weight"].shape
    layers = {name.split(".")[1] for name in state if name.startswith("layers.")}
    config = LlamaGenConfig(
        depth=len(layers),
        width=width,
        heads=heads or width // (100 if width == 3200 else 64),
        vocab_size=vocab_size,
        condition=ClassConfig(state["cls_embedding.embedding_table.weight"].shape[0] - 1),
        hidden=state["layers.0.feed_forward.w1.weight"].shape[0],
        zero_prefix=True,
    )
    return config, CategoricalConfig(width, vocab_size, bias=False, init_scale=0.0)


def generator_from_published(state: Mapping[str, Tensor], configs: Configs) -> tuple[State, State]:
    """A published generator's tensors as the states of `LlamaGen` and `CategoricalHead`."""
    generator, head = (build_empty(config.build).state_dict() for config in configs)
    found = from_published(state, joined(generator=generator, head=head), RULES, "the LlamaGen checkpoint")
    return part(found, "generator."), part(found, "head.")


def generator_to_published(state: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> State:
    """The inverse."""
    return to_published(joined(generator=state, head=head), RULES)
